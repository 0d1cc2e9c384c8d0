#!/usr/bin/env bash
# Megatron checkpoint -> Hugging Face folder, on one node.
set -euo pipefail
source examples/qwen3/settings.sh

megatron-replay convert "$TRAINED" "$HF-sql" --verify
