"""AdamW (arXiv 1711.05101): the baseline."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.kernels.tensor_updates import Correction
from megatron_replay.optim.adam import AdamFamily
from megatron_replay.optim.base import OPTIMIZERS, Common, Group
from megatron_replay.optim.option_checks import check_betas, check_number
from megatron_replay.optim.shards import LOCAL, Shards


def adamw_correction(step: int, betas: tuple[float, float], eps: float) -> Correction:
    """AdamW's bias corrections after `step` steps."""
    return Correction(first=1 / (1 - betas[0] ** step), second=1 / math.sqrt(1 - betas[1] ** step), eps=eps)


def adamw_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    out: tuple[Tensor, Tensor],
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """(m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) for flat moments [n].

    It is written into the first of two vectors of n or more.
    """
    n, fix = exp_avg.numel(), adamw_correction(step, betas, eps)
    numerator, denominator = out[0][:n], out[1][:n]
    torch.sqrt(exp_avg_sq, out=denominator)
    denominator.mul_(fix.second).add_(eps)
    return torch.div(exp_avg, denominator, out=numerator).mul_(fix.first)


class AdamWOptions(Common, total=False):
    """The keyword arguments of `AdamW`, for those derived from it."""

    betas: tuple[float, float]
    weight_decay: float
    eps: float
    shards: Shards


@OPTIMIZERS.register("adamw")
class AdamW(AdamFamily):
    """torch.optim.AdamW to rounding, with gradient clipping inside and shards."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        eps: float = 1e-8,
        shards: Shards = LOCAL,
        **common: Unpack[Common],
    ) -> None:
        check_number("eps", eps, at_least=0)
        defaults = {"lr": lr, "betas": check_betas(betas), "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults, shards, common)

    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: tuple[Tensor, Tensor], group: Group) -> Tensor:
        betas, eps = self.setting(group, "betas"), self.setting(group, "eps")
        return adamw_direction(exp_avg, exp_avg_sq, scratch, step=group["step"], betas=betas, eps=eps)

    def correction(self, group: Group) -> Correction | None:
        return adamw_correction(group["step"], self.setting(group, "betas"), self.setting(group, "eps"))
