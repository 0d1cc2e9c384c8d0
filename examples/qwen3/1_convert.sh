#!/usr/bin/env bash
# Hugging Face folder -> megatron checkpoint, on one node; any layout loads it.
set -euo pipefail
source examples/qwen3/settings.sh

megatron-replay convert "$HF" "$BASE"
