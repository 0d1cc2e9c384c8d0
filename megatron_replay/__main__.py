"""`python -m megatron_replay` is the `megatron-replay` command."""

from __future__ import annotations

import sys

from megatron_replay.cli import main

if __name__ == "__main__":
    sys.exit(main())
