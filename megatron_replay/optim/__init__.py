"""Optimizers: one rule and one class a file, each an ordinary torch optimizer that also works on shards of a model."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from .adam_atan2 import AdamAtan2
from .adamuon import AdaMuon
from .adamw import AdamW
from .base import OPTIMIZERS, ReplayOptimizer
from .freeze import half
from .moclip import MoClip
from .mofo import MoFO
from .muon import HIDDEN, Muon, muon_groups
from .muonclip import AttentionLogits, MuonClip, ObservedLogits
from .schedule import learning_rate
from .shards import LOCAL, Kind, Placement, Shards
from .tam import TAM

__all__ = [
    "HIDDEN",
    "LOCAL",
    "OPTIMIZERS",
    "TAM",
    "AdaMuon",
    "AdamAtan2",
    "AdamW",
    "AttentionLogits",
    "Kind",
    "MoClip",
    "MoFO",
    "Muon",
    "MuonClip",
    "ObservedLogits",
    "Placement",
    "ReplayOptimizer",
    "Shards",
    "build_optimizer",
    "half",
    "learning_rate",
    "muon_groups",
]


def build_optimizer(name: str, params: ParamsT, lr: float, **options: Any) -> ReplayOptimizer:
    """The optimizer of that name (`OPTIMIZERS` lists them); ConfigError, with the nearest name, for one or an option
    unknown."""
    return OPTIMIZERS.build(name, params, lr, **options)
