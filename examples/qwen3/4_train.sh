#!/usr/bin/env bash
# Stage 1: train with the loss restricted to the stored sets and MoClip. Further keys and flags may follow: 4_train.sh --train-iters 100
set -euo pipefail
source examples/qwen3/settings.sh

"${LAUNCH[@]}" train "$CONFIG" "model=$BASE" "${LAYOUT[@]}" \
    --micro-batch-size "$MBS" \
    --global-batch-size "$GBS" \
    --seq-length "$SEQ_LEN" \
    --lr 1.25e-6 \
    --min-lr 1.25e-7 \
    --lr-decay-style cosine \
    --weight-decay 0.1 \
    --clip-grad 1.0 \
    --adam-beta1 0.9 \
    --adam-beta2 0.95 \
    --seed 42 \
    optimizer.name=moclip \
    optimizer.max_angle=45 \
    "$@"
