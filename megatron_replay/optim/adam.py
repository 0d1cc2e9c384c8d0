"""What the optimizers with Adam's two moments share: how the moments advance, and the walk over a parameter in blocks."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Group, Move, ReplayOptimizer, state_dtype
from .blocks import Scratch, cuts
from .shards import Placement


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


def decayed_step(param: Tensor, direction: Tensor, *, lr: float, weight_decay: float, gain: float = 1.0) -> None:
    """theta <- theta (1 - lr wd) - lr gain u, in place on the parameter; `direction` u, of its shape, is overwritten."""
    if lr * weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.sub_(direction.mul_(lr * gain))


class AdamFamily(ReplayOptimizer):
    """Keeps `exp_avg` and `exp_avg_sq`; a subclass gives the direction, and may mix momentum into the gradient, filter or scale."""

    state_keys = ("exp_avg", "exp_avg_sq")
    _scale = 1.0

    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        self._scale = scale

    def mix(self, row: int, betas: tuple[float, float]) -> Mix:
        """How the gradient of a row of the table enters the moments in this step."""
        return plain_mix(betas, self.gradient_scale(row))

    def gradient_scale(self, row: int) -> float:
        """What the gradient of a row is multiplied by: the clipping factor."""
        return self._scale

    @abstractmethod
    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: tuple[Tensor, Tensor], group: Group) -> Tensor:
        """The step u [n] for moments [n], written into the first scratch vector, which is padded beyond n."""

    def filter(self, direction: Tensor, exp_avg: Tensor, row: int) -> None:
        """Change the direction [n] in place, knowing the new momentum [n]; as it stands, leave it."""

    def gain(self, row: int) -> float:
        """What the direction of a row is multiplied by; decay is not."""
        return 1.0

    def update(self, move: Move) -> Tensor:
        return self._walk(move)

    def advance(self, move: Move) -> None:
        """The first half of `update`: the moments alone."""
        self._walk(move, descend=False)

    def descend(self, move: Move) -> Tensor:
        """The second half: the step that the moments ask for."""
        return self._walk(move, advance=False)

    def _walk(self, move: Move, *, advance: bool = True, descend: bool = True) -> Tensor:
        param, group = move.param, move.group
        state, dtype, betas = self.state_of(param), state_dtype(param), self.setting(group, "betas")
        mix, gain = self.mix(move.row, betas), self.gain(move.row)
        theta, g = param.reshape(-1), move.grad.reshape(-1)
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        scratch = Scratch(param.numel(), dtype, param.device)
        squares = torch.zeros((), dtype=torch.float64, device=param.device)
        for cut in cuts(param.numel(), param.device):
            pair = scratch.vectors(cut.stop - cut.start)
            exact = (pair[0][: cut.stop - cut.start], pair[1][: cut.stop - cut.start])
            if advance:
                advance_moments(m[cut], v[cut], g[cut].to(dtype), exact, mix=mix, beta2=betas[1])
            if descend:
                step = self.direction(m[cut], v[cut], pair, group)
                self.filter(step, m[cut], move.row)
                squares += torch.linalg.vector_norm(step, dtype=torch.float64).square()
                block = theta[cut].to(dtype)  # a view, unless the parameter is bfloat16
                decayed_step(block, step, lr=self.rate(group), gain=gain, weight_decay=group["weight_decay"])
                if dtype != theta.dtype:
                    theta[cut] = block
        if not param.is_contiguous():
            param.copy_(theta.view(param.shape))
        return squares * gain**2
