#!/usr/bin/env bash
# A small NL2SQL task made here, to try the way with: data/train.jsonl, data/test.jsonl, data/databases. Put your own files there instead.
set -euo pipefail
TRAIN=${TRAIN:-600}
TEST=${TEST:-120}

python examples/nl2sql/make_task.py data --train "$TRAIN" --test "$TEST"
# general text, of which nothing is to be forgotten
python -c 'from megatron_replay.demo.task import GENERAL_TEXT; print(GENERAL_TEXT.read_text(encoding="utf-8"), end="")' > data/general.txt
