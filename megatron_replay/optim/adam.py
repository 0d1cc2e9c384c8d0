"""Adam's two moments, and the base class of the optimizers that keep them.

The class advances the moments and walks over a parameter in blocks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_replay.kernels import tensor_updates
from megatron_replay.optim.base import Group, ParamUpdate, ReplayOptimizer, state_dtype
from megatron_replay.optim.blocks import Scratch, cuts
from megatron_replay.optim.shards import Placement
from megatron_replay.optim.stats import home, sum_of_squares


@dataclass(frozen=True)
class MomentCoefficients:
    """The coefficients with which a gradient g enters the moments.

    m <- m_keep m + m_grad g, and v <- beta2 v + (v_grad g + v_momentum m)^2. The second formula takes the m of the step
    before.
    """

    m_keep: float
    m_grad: float
    v_grad: float
    v_momentum: float = 0.0


def adam_coefficients(betas: tuple[float, float], scale: float) -> MomentCoefficients:
    """Adam's own coefficients for a gradient that is multiplied by `scale`, the clipping factor."""
    beta1, beta2 = betas
    return MomentCoefficients(m_keep=beta1, m_grad=(1 - beta1) * scale, v_grad=math.sqrt(1 - beta2) * scale)


def advance_moments(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    scratch: tuple[Tensor, Tensor],
    *,
    coefficients: MomentCoefficients,
    beta2: float,
) -> None:
    """One step of both moments, in place; all are flat vectors [n] of one dtype, the scratch vectors included.

    Every operation rounds once. A vectorised loop may take a fused multiply-add where its scalar remainder does not,
    and then the result would depend on where a shard begins.
    """
    first, second = scratch
    torch.mul(grad, coefficients.v_grad, out=first)
    if coefficients.v_momentum:
        first.add_(torch.mul(exp_avg, coefficients.v_momentum, out=second))
    exp_avg_sq.mul_(beta2).add_(first.mul_(first))
    exp_avg.mul_(coefficients.m_keep).add_(torch.mul(grad, coefficients.m_grad, out=first))


def decayed_step(param: Tensor, direction: Tensor, *, lr: float, weight_decay: float, gain: float = 1.0) -> None:
    """Do theta <- theta (1 - lr wd) - lr gain u in place on the parameter.

    `direction`, u of its shape, is overwritten.
    """
    if lr * weight_decay:
        param.mul_(1 - lr * weight_decay)
    param.sub_(direction.mul_(lr * gain))


class AdamFamily(ReplayOptimizer):
    """An optimizer that keeps `exp_avg` and `exp_avg_sq`.

    A subclass gives the direction. It may also change how the gradient enters the moments, filter the direction, or
    scale it.
    """

    state_keys = ("exp_avg", "exp_avg_sq")
    _scale = 1.0

    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        self._scale = scale

    def moment_coefficients(self, row: int, betas: tuple[float, float]) -> MomentCoefficients:
        """The coefficients with which the gradient of a row of the table enters the moments in this step."""
        return adam_coefficients(betas, self.gradient_scale(row))

    def gradient_scale(self, row: int) -> float:
        """The factor of a row's gradient: the clipping factor."""
        return self._scale

    @abstractmethod
    def direction(self, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: tuple[Tensor, Tensor], group: Group) -> Tensor:
        """The step u [n] for moments [n], written into the first scratch vector, which is padded beyond n."""

    def correction(self, group: Group) -> tensor_updates.Correction | None:
        """The same direction in the compiled kernel's terms; None, the default, where the kernel cannot compute it."""
        return None

    def filter(self, direction: Tensor, exp_avg: Tensor, grad: Tensor, row: int) -> None:
        """Change the direction [n] in place, knowing the new momentum [n] and the gradient [n]; the default leaves it.

        The gradient is the parameter's own, in its own dtype and before clipping; it must not be changed. One block of
        a parameter is filtered at a time, so the rule must be elementwise; `apply` is the place to find what it needs
        of the whole tensor (see `MoFO`). A class that overrides this takes the plain walk, not the compiled kernel.
        """

    def gain(self, row: int) -> float:
        """The factor of a row's direction; it does not scale the decay."""
        return 1.0

    def apply(self, updates: Sequence[ParamUpdate], place: Placement) -> None:
        pieces = [self._fused_update(update) for update in updates]
        fused = [(update, piece) for update, piece in zip(updates, pieces, strict=True) if piece]
        if fused:
            self._apply_fused([update for update, _ in fused], [piece for _, piece in fused])
        super().apply([update for update, piece in zip(updates, pieces, strict=True) if not piece], place)

    def _apply_fused(self, updates: Sequence[ParamUpdate], pieces: Sequence[tensor_updates.TensorUpdate]) -> None:
        for update, piece, squares in zip(updates, pieces, tensor_updates.update(pieces), strict=True):
            if not update.param.is_contiguous():
                update.param.copy_(piece.weight)
            self.record_squares(update.param, squares * self.gain(update.row) ** 2)

    def _fused_update(self, update: ParamUpdate) -> tensor_updates.TensorUpdate | None:
        """The kernel's arguments for updating this parameter as `_walk` would; None where the kernel cannot do that."""
        weight = self.weight(update.param)
        known = kernel_knows(type(self)) and tensor_updates.updatable(weight, update.grad, mode=self.kernels)
        fix = self.correction(update.group) if known else None
        if fix is None:
            return None
        state, betas, lr = self.state_of(update.param), self.setting(update.group, "betas"), self.rate(update.group)
        coefficients = self.moment_coefficients(update.row, betas)
        scalars = tensor_updates.Scalars(
            coefficients.m_keep,
            coefficients.m_grad,
            coefficients.v_grad,
            coefficients.v_momentum,
            betas[1],
            fix.first,
            fix.second,
            fix.eps or 0.0,
            1 - lr * update.group["weight_decay"],
            lr * self.gain(update.row),
            fix.eps is None,
        )
        rounded = update.param if weight is not update.param and update.param.is_contiguous() else None
        return tensor_updates.TensorUpdate(
            weight.contiguous(), update.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"], rounded, scalars
        )

    def update_param(self, update: ParamUpdate) -> Tensor:
        return self._walk(update)

    def advance(self, update: ParamUpdate) -> None:
        """Do the first half of `update_param`: advance the moments."""
        self._walk(update, descend=False)

    def descend(self, update: ParamUpdate) -> Tensor:
        """Do the second half of `update_param`: the step that the moments ask for."""
        return self._walk(update, advance=False)

    def _walk(self, update: ParamUpdate, *, advance: bool = True, descend: bool = True) -> Tensor:
        param, group, row = update.param, update.group, update.row
        state, dtype, betas = self.state_of(param), state_dtype(param), self.setting(group, "betas")
        coefficients, gain = self.moment_coefficients(row, betas), self.gain(row)
        weight = self.weight(param)
        theta, g = weight.reshape(-1), update.grad.reshape(-1)
        m, v = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        scratch = Scratch(param.numel(), dtype, param.device)
        squares = torch.zeros((), dtype=torch.float64, device=home(param.device))
        for cut in cuts(param.numel(), param.device):
            pair = scratch.vectors(cut.stop - cut.start)
            exact = (pair[0][: cut.stop - cut.start], pair[1][: cut.stop - cut.start])
            if advance:
                advance_moments(m[cut], v[cut], g[cut].to(dtype), exact, coefficients=coefficients, beta2=betas[1])
            if descend:
                step = self.direction(m[cut], v[cut], pair, group)
                self.filter(step, m[cut], g[cut], row)
                squares += sum_of_squares(step)
                block = theta[cut].to(dtype)  # a view, unless the parameter is bfloat16
                decayed_step(block, step, lr=self.rate(group), gain=gain, weight_decay=group["weight_decay"])
                if dtype != theta.dtype:
                    theta[cut] = block
        if not weight.is_contiguous():
            weight.copy_(theta.view(param.shape))
        self.round_main_weights(param)
        return squares * gain**2


@cache
def kernel_knows(kind: type[AdamFamily]) -> bool:
    """True where the kernel does all that this class does.

    No class between `AdamFamily` and this one may have a walk or a filter of its own. One class must give both the
    direction and its correction.
    """
    walks = all(getattr(kind, name) is getattr(AdamFamily, name) for name in ("_walk", "update_param", "filter"))
    givers = {next(c for c in kind.__mro__ if name in vars(c)) for name in ("direction", "correction")}
    return walks and len(givers) == 1
