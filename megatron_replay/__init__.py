"""Post-training on a domain without forgetting: candidate sets, a loss restricted to them, and MoClip.

The sets come from the base model. The public names below are imported on first use, so that `import megatron_replay`
needs neither torch nor megatron.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES_OF = {
    "megatron_replay.config": ["RunConfig"],
    "megatron_replay.errors": [
        "ReplayError",
        "ConfigError",
        "DataError",
        "StoreError",
        "CheckpointError",
        "LayoutError",
        "DeviceError",
    ],
    "megatron_replay.ops": [
        "VocabShard",
        "CandidateSets",
        "dynamic_topk",
        "select_positions",
        "restricted_linear_cross_entropy",
        "restricted_linear_terms",
        "restricted_cross_entropy",
    ],
    "megatron_replay.optim": [
        "AdamW",
        "AdamAtan2",
        "MoClip",
        "MoFO",
        "TAM",
        "Muon",
        "AdaMuon",
        "MuonClip",
        "build_optimizer",
    ],
    "megatron_replay.store": ["CandidateStore"],
}
_HOME = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
