"""Adam-atan2 (arXiv 2407.05872, section 5): Adam without epsilon.

It does not depend on the gradient's scale, and its steps are at most lr pi / 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.kernels.tensor_updates import Correction
from megatron_replay.optim.adam import AdamFamily
from megatron_replay.optim.base import OPTIMIZERS, Common, Group
from megatron_replay.optim.option_checks import check_betas
from megatron_replay.optim.shards import LOCAL, Shards


def atan2_correction(step: int, betas: tuple[float, float]) -> Correction:
    """Adam's two bias corrections as one factor of the momentum."""
    return Correction(first=math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step))


def atan2_direction(
    exp_avg: Tensor, exp_avg_sq: Tensor, out: tuple[Tensor, Tensor], *, step: int, betas: tuple[float, float]
) -> Tensor:
    """atan2(m / (1 - beta1^t), sqrt(v / (1 - beta2^t))) for flat moments [n] (paper eq. 9, with bias correction).

    atan2(0, 0) is 0. Both sides are multiplied by sqrt(1 - beta2^t), which leaves the angle as it is. `out` are two
    vectors of n elements or more, and the result is the first n of the first. The arctangent is taken of all elements,
    so that padding decides which code computes the last ones.
    """
    y, x = out
    n = exp_avg.numel()
    torch.mul(exp_avg, atan2_correction(step, betas).first, out=y[:n])
    torch.sqrt(exp_avg_sq, out=x[:n])
    return torch.atan2(y, x, out=y)[:n]


class Atan2Family(AdamFamily):
    """An optimizer of Adam's family that steps in the arctangent direction."""

    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: tuple[Tensor, Tensor], group: Group) -> Tensor:
        return atan2_direction(exp_avg, exp_avg_sq, scratch, step=group["step"], betas=self.setting(group, "betas"))

    def correction(self, group: Group) -> Correction | None:
        return atan2_correction(group["step"], self.setting(group, "betas"))


@OPTIMIZERS.register("adam_atan2")
class AdamAtan2(Atan2Family):
    """Adam-atan2 with a = b = 1: the same bits as `MoClip` with max_angle 90, without reading the momentum twice."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        shards: Shards = LOCAL,
        **common: Unpack[Common],
    ) -> None:
        defaults = {"lr": lr, "betas": check_betas(betas), "weight_decay": weight_decay}
        super().__init__(params, defaults, shards, common)
