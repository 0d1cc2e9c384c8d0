#!/usr/bin/env bash
# What was learnt (NLL of the targets, SQL that runs) and what was kept (perplexity of general text). Before training: 5_evaluate.sh model=runs/qwen3-4b/base
set -euo pipefail
source examples/qwen3/settings.sh

"${LAUNCH[@]}" evaluate "$CONFIG" "model=$TRAINED" "${LAYOUT[@]}" \
    --seq-length "$SEQ_LEN" \
    evaluate.nl2sql=data/test.jsonl \
    evaluate.databases=data/databases \
    evaluate.output="runs/qwen3-$MODEL/evaluation.json" \
    "$@"
