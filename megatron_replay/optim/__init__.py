"""Optimizers: one rule and one class a file, each an ordinary torch optimizer that also works on shards of a model."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from megatron_replay.optim.adam_atan2 import AdamAtan2
from megatron_replay.optim.adamuon import AdaMuon
from megatron_replay.optim.adamw import AdamW
from megatron_replay.optim.base import OPTIMIZERS, ReplayOptimizer
from megatron_replay.optim.half import half
from megatron_replay.optim.moclip import MoClip
from megatron_replay.optim.mofo import MoFO
from megatron_replay.optim.muon import HIDDEN, Muon, muon_groups
from megatron_replay.optim.muonclip import AttentionLogits, MuonClip, ObservedLogits
from megatron_replay.optim.schedule import learning_rate
from megatron_replay.optim.shards import LOCAL, Kind, Placement, Shards
from megatron_replay.optim.tam import TAM

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
    """The optimizer of that name (`OPTIMIZERS` lists them).

    Raises ConfigError, with the nearest name, for an unknown name or option.
    """
    return OPTIMIZERS.build(name, params, lr, **options)
