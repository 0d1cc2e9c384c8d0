"""MoFO (arXiv 2407.20999): Adam's state for every parameter, but only those with the largest momentum are updated.

Updating fewer of them forgets less.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.errors import ConfigError
from megatron_replay.optim.adamw import AdamW, AdamWOptions
from megatron_replay.optim.base import OPTIMIZERS, ParamUpdate
from megatron_replay.optim.radix import ShardValues, thresholds
from megatron_replay.optim.shards import Placement


def momentum_filter(direction: Tensor, exp_avg: Tensor, threshold: float) -> None:
    """Zero the direction [n], in place, where |m| is below the threshold; ties stay (paper section 2, FLT_alpha)."""
    direction.masked_fill_(exp_avg.abs() < threshold, 0.0)


@OPTIMIZERS.register("mofo")
class MoFO(AdamW):
    """AdamW whose step is taken only where |m|, after its update, is among the top `fraction` of its logical tensor.

    The threshold is the whole tensor's, however it is sharded. It takes three more small collectives a step, and seven
    for float64. 1-D tensors are not filtered; decay acts on every coordinate. The tensors are those of the model as it
    is built: megatron fuses query, key and value, and gate and up.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        fraction: float = 0.2,
        **others: Unpack[AdamWOptions],
    ) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ConfigError(f"fraction must be a share in (0, 1], got {fraction!r}")
        super().__init__(params, lr, **others)
        self.fraction = fraction
        self._thresholds: dict[int, float] = {}

    def apply(self, updates: Sequence[ParamUpdate], place: Placement) -> None:
        for update in updates:
            self.advance(update)
        rows = {row: index for index, row in enumerate(row for row, kind in enumerate(place.kinds) if kind != "vector")}
        counted = dict(zip((p for group in self.param_groups for p in group["params"]), place.counted, strict=True))
        momenta = [
            ShardValues(self.state[update.param]["exp_avg"], rows[update.row], counted[update.param])
            for update in updates
            if update.row in rows
        ]
        found = thresholds(momenta, len(rows), self.fraction, self.shards.sum)
        self._thresholds = {row: found[index] for row, index in rows.items()}
        for update in updates:
            self.record_squares(update.param, self.descend(update))

    def filter(self, direction: Tensor, exp_avg: Tensor, grad: Tensor, row: int) -> None:
        if row in self._thresholds:
            momentum_filter(direction, exp_avg, self._thresholds[row])
