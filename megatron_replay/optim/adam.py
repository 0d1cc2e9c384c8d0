"""What the optimizers with Adam's two moments share: how the moments advance, and the walk over a parameter in
blocks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_replay.kernels import optimizer as kernels
from megatron_replay.optim.base import Group, Move, ReplayOptimizer, state_dtype
from megatron_replay.optim.blocks import Scratch, cuts
from megatron_replay.optim.shards import Placement
from megatron_replay.optim.stats import home, sum_of_squares


@dataclass(frozen=True)
class Mix:
    """How the gradient enters the moments: m <- m_keep m + m_grad g, and v <- beta2 v + (v_grad g + v_momentum m)^2
    with the m before."""

    m_keep: float
    m_grad: float
    v_grad: float
    v_momentum: float = 0.0


def plain_mix(betas: tuple[float, float], scale: float) -> Mix:
    """Adam's own: the gradient scaled by the clipping factor."""
    beta1, beta2 = betas
    return Mix(m_keep=beta1, m_grad=(1 - beta1) * scale, v_grad=math.sqrt(1 - beta2) * scale)


def advance_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, scratch: tuple[Tensor, Tensor], *, mix: Mix, beta2: float
) -> None:
    """One step of both moments, in place; all are flat vectors [n] of one dtype, the scratch vectors included.

    Every operation rounds once: a fused multiply-add may be taken by a vectorised loop and not by its scalar remainder,
    and then the result would depend on where a shard begins.
    """
    first, second = scratch
    torch.mul(grad, mix.v_grad, out=first)
    if mix.v_momentum:
        first.add_(torch.mul(exp_avg, mix.v_momentum, out=second))
    exp_avg_sq.mul_(beta2).add_(first.mul_(first))
    exp_avg.mul_(mix.m_keep).add_(torch.mul(grad, mix.m_grad, out=first))


def decayed_step(param: Tensor, direction: Tensor, *, lr: float, weight_decay: float, gain: float = 1.0) -> None:
    """theta <- theta (1 - lr wd) - lr gain u, in place on the parameter; `direction` u, of its shape, is
    overwritten."""
    if lr * weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.sub_(direction.mul_(lr * gain))


class AdamFamily(ReplayOptimizer):
    """Keeps `exp_avg` and `exp_avg_sq`; a subclass gives the direction, and may mix momentum into the gradient, filter
    or scale."""

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

    def correction(self, group: Group) -> kernels.Correction | None:
        """The same direction as the compiled kernel takes it; None, unless a subclass knows better: it cannot."""
        return None

    def filter(self, direction: Tensor, exp_avg: Tensor, row: int) -> None:
        """Change the direction [n] in place, knowing the new momentum [n]; as it stands, leave it."""

    def gain(self, row: int) -> float:
        """What the direction of a row is multiplied by; decay is not."""
        return 1.0

    def apply(self, moves: Sequence[Move], place: Placement) -> None:
        pieces = [self._piece(move) for move in moves]
        fused = [(move, piece) for move, piece in zip(moves, pieces, strict=True) if piece]
        if fused:
            self._apply_fused([move for move, _ in fused], [piece for _, piece in fused])
        super().apply([move for move, piece in zip(moves, pieces, strict=True) if not piece], place)

    def _apply_fused(self, moves: Sequence[Move], pieces: Sequence[kernels.TensorUpdate]) -> None:
        for move, piece, squares in zip(moves, pieces, kernels.update(pieces), strict=True):
            if not move.param.is_contiguous():
                move.param.copy_(piece.weight)
            self.travelled(move.param, squares * self.gain(move.row) ** 2)

    def _piece(self, move: Move) -> kernels.TensorUpdate | None:
        """What the kernel needs to move this parameter as `_walk` would; None where it cannot."""
        weight = self.weight(move.param)
        known = _kernel_knows(type(self)) and kernels.updatable(weight, move.grad, mode=self.kernels)
        fix = self.correction(move.group) if known else None
        if fix is None:
            return None
        state, betas, lr = self.state_of(move.param), self.setting(move.group, "betas"), self.rate(move.group)
        mix, keep, rate = self.mix(move.row, betas), 1 - lr * move.group["weight_decay"], lr * self.gain(move.row)
        scalars = kernels.Scalars(
            mix.m_keep,
            mix.m_grad,
            mix.v_grad,
            mix.v_momentum,
            betas[1],
            fix.first,
            fix.second,
            fix.eps or 0.0,
            keep,
            rate,
            fix.eps is None,
        )
        rounded = move.param if weight is not move.param and move.param.is_contiguous() else None
        return kernels.TensorUpdate(
            weight.contiguous(), move.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], rounded, scalars
        )

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
        weight = self.weight(param)
        theta, g = weight.reshape(-1), move.grad.reshape(-1)
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        scratch = Scratch(param.numel(), dtype, param.device)
        squares = torch.zeros((), dtype=torch.float64, device=home(param.device))
        for cut in cuts(param.numel(), param.device):
            pair = scratch.vectors(cut.stop - cut.start)
            exact = (pair[0][: cut.stop - cut.start], pair[1][: cut.stop - cut.start])
            if advance:
                advance_moments(m[cut], v[cut], g[cut].to(dtype), exact, mix=mix, beta2=betas[1])
            if descend:
                step = self.direction(m[cut], v[cut], pair, group)
                self.filter(step, m[cut], move.row)
                squares += sum_of_squares(step)
                block = theta[cut].to(dtype)  # a view, unless the parameter is bfloat16
                decayed_step(block, step, lr=self.rate(group), gain=gain, weight_decay=group["weight_decay"])
                if dtype != theta.dtype:
                    theta[cut] = block
        if not weight.is_contiguous():
            weight.copy_(theta.view(param.shape))
        self.settle(param)
        return squares * gain**2


@cache
def _kernel_knows(kind: type[AdamFamily]) -> bool:
    """Whether the kernel does all that this class does: none between here and there may have a walk, a filter or a
    direction of its own."""
    walks = all(getattr(kind, name) is getattr(AdamFamily, name) for name in ("_walk", "update", "filter"))
    givers = {next(c for c in kind.__mro__ if name in vars(c)) for name in ("direction", "correction")}
    return walks and len(givers) == 1
