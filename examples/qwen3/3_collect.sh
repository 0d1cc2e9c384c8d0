#!/usr/bin/env bash
# Stage 0: run the base model over the data once and store the candidate sets.
set -euo pipefail
source examples/qwen3/settings.sh

"${LAUNCH[@]}" collect "$CONFIG" "model=$BASE" "${LAYOUT[@]}" \
    --micro-batch-size "$MBS" \
    --seq-length "$SEQ_LEN" \
    collect.tau=0.95 \
    collect.k_max=200 \
    "$@"
