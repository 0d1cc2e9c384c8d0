"""AdaMuon (arXiv 2507.11005): Muon's orthogonal direction, scaled element by element by its own second moment."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_replay.optim.base import OPTIMIZERS, ParamUpdate
from megatron_replay.optim.muon import Muon
from megatron_replay.optim.stats import sum_of_squares


def adamuon_direction(
    blend: Tensor, second: Tensor, orthogonal: Callable[[Tensor], Tensor], *, momentum: float, eps: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """(direction, new second moment) of a whole matrix [rows, cols]: O = NS(sign(blend)), V <- mu V + (1 - mu) O^2.

    The direction is 0.2 sqrt(rows cols) / |O^| O^ with O^ = O / (sqrt V + eps), where |.| is the Frobenius norm. Its
    root mean square is 0.2.
    """
    o = orthogonal(blend.sign())
    second = second.mul(momentum).add_(o.square(), alpha=1 - momentum)
    scaled = o.div_(second.sqrt().add_(eps))
    norm = math.sqrt(float(sum_of_squares(scaled)))
    return (scaled.mul_(0.2 * math.sqrt(scaled.numel()) / norm) if norm else scaled), second


@OPTIMIZERS.register("adamuon")
class AdaMuon(Muon):
    """AdaMuon on hidden matrices, AdamW on everything else; see `Muon` for the groups.

    `momentum` serves both moments.
    """

    prefix = "adamuon"
    matrix_keys = ("exp_avg", "exp_avg_sq")

    def before(self, update: ParamUpdate) -> Tensor:
        return torch.stack([super().before(update)[0], self.state[update.param]["exp_avg_sq"]])

    def whole(self, values: Tensor) -> Tensor:
        return torch.stack(adamuon_direction(values[0], values[1], self.orthogonal, momentum=self.momentum))

    def after(self, update: ParamUpdate, result: Tensor) -> Tensor:
        self.state[update.param]["exp_avg_sq"].copy_(result[1])
        return self.take_step(update.param, result[0], update.group)
