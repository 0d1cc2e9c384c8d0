"""What the optimizers with Adam's two moments share: how the moments advance, and the walk over a parameter in blocks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Group, ReplayOptimizer, state_dtype
from .blocks import Scratch, cuts


@dataclass(frozen=True)
class Mix:
    """How the gradient enters the moments: m <- m_keep m + m_grad g, and v <- beta2 v + (v_grad g + v_momentum m)^2 with the m before."""

    m_keep: float
    m_grad: float
    v_grad: float
    v_momentum: float = 0.0


def plain_mix(betas: tuple[float, float], scale: float) -> Mix:
    """Adam's own: the gradient scaled by the clipping factor."""
    beta1, beta2 = betas
    return Mix(m_keep=beta1, m_grad=(1 - beta1) * scale, v_grad=math.sqrt(1 - beta2) * scale)


def advance_moments(exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, scratch: tuple[Tensor, Tensor], *, mix: Mix, beta2: float) -> None:
    """One step of both moments, in place; all are flat vectors [n] of one dtype, the scratch vectors included.

    Every operation rounds once: a fused multiply-add may be taken by a vectorised loop and not by its scalar remainder, and then the result
    would depend on where a shard begins.
    """
    first, second = scratch
    torch.mul(grad, mix.v_grad, out=first)
    if mix.v_momentum:
        first.add_(torch.mul(exp_avg, mix.v_momentum, out=second))
    exp_avg_sq.mul_(beta2).add_(first.mul_(first))
    exp_avg.mul_(mix.m_keep).add_(torch.mul(grad, mix.m_grad, out=first))


def decayed_step(param: Tensor, direction: Tensor, *, lr: float, weight_decay: float) -> None:
    """theta <- theta (1 - lr wd) - lr u, in place on the flat parameter [n]; `direction` u [n] is overwritten."""
    if lr * weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.sub_(direction.mul_(lr))


class AdamFamily(ReplayOptimizer):
    """Keeps `exp_avg` and `exp_avg_sq`; a subclass gives the direction, and may mix momentum into the gradient."""

    state_keys = ("exp_avg", "exp_avg_sq")
    _scale = 1.0

    def plan(self, sums: Tensor, layers: Sequence[int], scale: float) -> None:
        self._scale = scale

    def mix(self, row: int, betas: tuple[float, float]) -> Mix:
        """How the gradient of a row of the table enters the moments in this step."""
        return plain_mix(betas, self._scale)

    @abstractmethod
    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: tuple[Tensor, Tensor], group: Group) -> Tensor:
        """The step u [n] for moments [n], written into the first scratch vector, which is padded beyond n."""

    def update(self, param: Tensor, grad: Tensor, group: Group, row: int) -> None:
        state, dtype, betas = self.state_of(param), state_dtype(param), self.setting(group, "betas")
        mix = self.mix(row, betas)
        theta, g = param.reshape(-1), grad.reshape(-1)
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        scratch = Scratch(param.numel(), dtype, param.device)
        for cut in cuts(param.numel(), param.device):
            pair = scratch.vectors(cut.stop - cut.start)
            exact = tuple(vector[: cut.stop - cut.start] for vector in pair)
            advance_moments(m[cut], v[cut], g[cut].to(dtype), (exact[0], exact[1]), mix=mix, beta2=betas[1])
            step = self.direction(m[cut], v[cut], pair, group)
            block = theta[cut].to(dtype)  # a view, unless the parameter is bfloat16
            decayed_step(block, step, lr=group["lr"], weight_decay=group["weight_decay"])
            if dtype != theta.dtype:
                theta[cut] = block
        if not param.is_contiguous():
            param.copy_(theta.view(param.shape))
