"""Optimizers: one rule and one class a file, each an ordinary torch optimizer that also works on shards of a model."""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import ParamsT

from .adam_atan2 import AdamAtan2
from .adamw import AdamW
from .base import OPTIMIZERS, ReplayOptimizer
from .moclip import MoClip
from .schedule import learning_rate
from .shards import LOCAL, Placement, Shards

__all__ = ["LOCAL", "AdamAtan2", "AdamW", "MoClip", "Placement", "ReplayOptimizer", "Shards", "build_optimizer", "learning_rate"]


def build_optimizer(name: str, params: ParamsT, lr: float, **options: Any) -> ReplayOptimizer:
    """The optimizer of that name (`adamw`, `adam_atan2`, `moclip`); ConfigError, with the nearest name, for one or an option unknown."""
    return OPTIMIZERS.build(name, params, lr, **options)
