"""The optimizers' two passes over memory as operators on lists of tensors.

torch.ops.megatron_replay.optimizer_sums(Tensor[] grads, Tensor?[] momenta) -> Tensor
    [n, 3] float64: (sum m g, sum m^2, sum g^2) of each tensor, 0 for what needs an absent momentum.
    Gradients are float32 or bfloat16 with float32 momenta, or float64 with float64.
    The twin is `optim.stats.tensor_sums`.
torch.ops.megatron_replay.adam_update(
    Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] rounded,
    Tensor scalars) -> Tensor
    [n] float64: the sum of squares of each direction. Moments, direction, decay and step are done in place.
    Parameters and gradients are float32 or bfloat16, moments float32.
    `rounded` is empty, or the bfloat16 tensors that the float32 parameters are rounded into.
    scalars [n, 11] float64 are the fields of `Scalars`. The twin is the update of `optim.adam.AdamFamily`.

All tensors are contiguous. Neither result depends on the number of threads. A parameter's does not depend on where a
shard was cut or on the instruction set. The twin updates float64 parameters, since the kernel's arctangent is one for
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_replay.kernels.library import answering

_LOW = (torch.float32, torch.bfloat16)


class Scalars(NamedTuple):
    """The numbers one tensor's update depends on; float32 in the kernel.

    m <- m_keep m + m_grad g
    v <- beta2 v + (v_grad g + v_momentum m)^2, with the m before
    u = atan2(first m, sqrt v) if arctangent else first m / (second sqrt v + eps)
    theta <- keep theta - rate u
    """

    m_keep: float
    m_grad: float
    v_grad: float
    v_momentum: float
    beta2: float
    first: float
    second: float
    eps: float
    keep: float
    rate: float
    arctangent: bool


class Correction(NamedTuple):
    """A direction made of moments, as far as the kernel knows it: the last fields of `Scalars`.

    It is the arctangent's where eps is None.
    """

    first: float
    second: float = 1.0
    eps: float | None = None


class TensorUpdate(NamedTuple):
    """One tensor to update: contiguous, all of one size."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    rounded: Tensor | None
    """The tensor into which the weight is rounded to bfloat16, if any."""
    scalars: Scalars


def summable(grads: Sequence[Tensor], momenta: Sequence[Tensor | None], *, mode: str) -> bool:
    """True where `sums` takes these; there is at least one gradient."""
    live = answering("optimizer_sums", grads[0].device.type, mode) == "compiled"
    return live and all(_pair_summable(g, m) for g, m in zip(grads, momenta, strict=True))


def sums(grads: Sequence[Tensor], momenta: Sequence[Tensor | None]) -> Tensor:
    """(sum m g, sum m^2, sum g^2) of each gradient and momentum, [n, 3] float64."""
    flat = [None if m is None else m.contiguous() for m in momenta]
    result: Tensor = torch.ops.megatron_replay.optimizer_sums([g.contiguous() for g in grads], flat)
    return result


def updatable(param: Tensor, grad: Tensor, *, mode: str) -> bool:
    """True where `update` takes a parameter with this gradient."""
    known = param.dtype in _LOW and grad.dtype in _LOW and param.device == grad.device
    return known and answering("adam_update", param.device.type, mode) == "compiled"


def update(updates: Sequence[TensorUpdate]) -> Tensor:
    """Update all of them in one pass; [n] float64, the sum of squares of each direction."""
    squares = torch.zeros(len(updates), dtype=torch.float64)
    for wanted in (False, True):
        chosen = [i for i, update in enumerate(updates) if (update.rounded is not None) is wanted]
        if chosen:
            weights, grads, exp_avgs, exp_avg_sqs, rounded, scalars = zip(*(updates[i] for i in chosen), strict=True)
            low = list(rounded) if wanted else []
            table = torch.tensor(scalars, dtype=torch.float64)
            squares[chosen] = torch.ops.megatron_replay.adam_update(weights, grads, exp_avgs, exp_avg_sqs, low, table)
            torch.autograd.graph.increment_version([*weights, *exp_avgs, *exp_avg_sqs, *low])
    return squares


def _pair_summable(grad: Tensor, momentum: Tensor | None) -> bool:
    wanted = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.dtype in (*_LOW, torch.float64) and (momentum is None or momentum.dtype == wanted)
