"""The compiled twins of the two passes over memory: `stats.tensor_sums` and the update of `adam.AdamFamily`, for lists
of tensors.

torch.ops.megatron_replay.optimizer_sums(Tensor[] grads, Tensor?[] momenta) -> Tensor
    [n, 3] float64: (sum m g, sum m^2, sum g^2) of each tensor, 0 for what needs an absent momentum. Gradients are
    float32 or bfloat16 with float32 momenta, or float64 with float64.
torch.ops.megatron_replay.adam_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[]
exp_avg_sqs,
                                      Tensor(d!)[] rounded, Tensor scalars) -> Tensor
    Moments, direction, decay and step in place, and the sum of squares of each direction [n] float64. Parameters and
    gradients are float32 or bfloat16, moments float32. `rounded` is empty, or bfloat16 tensors that the float32
    parameters are rounded into. scalars [n, 11] float64 are the fields of `Scalars`.

All tensors are contiguous. Neither result depends on the number of threads, nor a parameter's on where a shard was cut
or on the instruction set. float64 parameters are left to the reference: the kernel's arctangent is one for float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_replay import compiled
from megatron_replay.optim.stats import tensor_sums

SCHEMAS = {
    "optimizer_sums": "(Tensor[] grads, Tensor?[] momenta) -> Tensor",
    "adam_update": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] rounded, "
    "Tensor scalars) -> Tensor",
}
OPERATORS = tuple(SCHEMAS)
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}
_LOW = (torch.float32, torch.bfloat16)


class Scalars(NamedTuple):
    """What one tensor's update depends on; float32 in the kernel.

    m <- m_keep m + m_grad g;  v <- beta2 v + (v_grad g + v_momentum m)^2 with the m before;
    u = atan2(first m, sqrt v) if arctangent else first m / (second sqrt v + eps);  theta <- keep theta - rate u.
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
    """A direction made of moments, as far as the kernel knows it: the last fields of `Scalars`, with its arctangent
    where eps is None."""

    first: float
    second: float = 1.0
    eps: float | None = None


class Piece(NamedTuple):
    """One tensor to update: contiguous, all of one size."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    rounded: Tensor | None
    """Where the weight is rounded to bfloat16, if anywhere."""
    scalars: Scalars


def live(device_type: str = "cpu", mode: str = "auto") -> dict[str, str]:
    """Which kernel answers on tensors of a device type, for each operator: "compiled" or "reference"."""
    compiled.check_mode(mode)

    def answer(name: str) -> str:
        known = hasattr(torch.ops.megatron_replay, name) and device_type in DISPATCH_KEYS
        there = known and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"megatron_replay::{name}", DISPATCH_KEYS[device_type]
        )
        return "compiled" if there and mode == "auto" else "reference"

    return {name: answer(name) for name in OPERATORS}


def sums(grads: Sequence[Tensor], momenta: Sequence[Tensor | None], *, mode: str) -> Tensor:
    """`stats.tensor_sums` of each pair, [n, 3] float64, where that puts them; n is at least 1."""
    pairs = list(zip(grads, momenta, strict=True))
    if live(grads[0].device.type, mode)["optimizer_sums"] == "compiled" and all(_summable(g, m) for g, m in pairs):
        flat = [None if m is None else m.contiguous() for m in momenta]
        result: Tensor = torch.ops.megatron_replay.optimizer_sums([g.contiguous() for g in grads], flat)
        return result
    return torch.stack([tensor_sums(g, m) for g, m in pairs])


def updatable(param: Tensor, grad: Tensor, *, mode: str) -> bool:
    """Whether `update` takes a parameter with this gradient."""
    known = param.dtype in _LOW and grad.dtype in _LOW and param.device == grad.device
    return known and live(param.device.type, mode)["adam_update"] == "compiled"


def update(pieces: Sequence[Piece]) -> Tensor:
    """Update all of them in one pass; [n] float64, the sum of squares of each direction."""
    squares = torch.zeros(len(pieces), dtype=torch.float64)
    for wanted in (False, True):
        chosen = [i for i, piece in enumerate(pieces) if (piece.rounded is not None) is wanted]
        if chosen:
            weights, grads, exp_avgs, exp_avg_sqs, rounded, scalars = zip(*(pieces[i] for i in chosen), strict=True)
            low = list(rounded) if wanted else []
            table = torch.tensor(scalars, dtype=torch.float64)
            squares[chosen] = torch.ops.megatron_replay.adam_update(weights, grads, exp_avgs, exp_avg_sqs, low, table)
            torch.autograd.graph.increment_version([*weights, *exp_avgs, *exp_avg_sqs, *low])
    return squares


def _summable(grad: Tensor, momentum: Tensor | None) -> bool:
    wanted = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.dtype in (*_LOW, torch.float64) and (momentum is None or momentum.dtype == wanted)


def _fake_sums(grads: Sequence[Tensor], momenta: Sequence[Tensor | None]) -> Tensor:
    return torch.empty(len(grads), 3, dtype=torch.float64)


def _fake_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rounded: Sequence[Tensor],
    scalars: Tensor,
) -> Tensor:
    return torch.empty(len(params), dtype=torch.float64)


def _load() -> str:
    """Load the compiled kernels, which register themselves; says why not where they cannot be had.

    Without them the schemas are defined here, for the kernels of another device.
    """
    state = compiled.load()
    fakes: dict[str, Callable[..., Tensor]] = {"optimizer_sums": _fake_sums, "adam_update": _fake_update}
    for name, fake in fakes.items():
        if not hasattr(torch.ops.megatron_replay, name):
            if state == "loaded":
                return f"cannot be used: built before {name} was there; build it again"
            LIBRARY.define(name + SCHEMAS[name])
        torch.library.register_fake(f"megatron_replay::{name}", fake, allow_override=True)
    return state


LIBRARY = torch.library.Library("megatron_replay", "FRAGMENT")
"""Kept alive: a schema defined in it lasts as long."""

EXTENSION = _load()
"""What became of the compiled kernels: "loaded", "not built", or why they cannot be used."""
