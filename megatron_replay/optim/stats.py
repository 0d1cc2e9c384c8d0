"""The sums an optimizer needs of its gradients: per tensor and in float64.

So they hardly depend on how a tensor is cut. Products of two float32 numbers are exact in float64. Only the order of
the additions is left to rounding (1e-16), far below the float32 resolution of the scalars made from the sums.

A device without float64 adds up chunks in float32, and the host adds the chunks in float64. There a sum of n products
is off by about 1e-7 of the sum of their magnitudes, for any n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megatron_replay.kernels import tensor_updates
from megatron_replay.kernels.precision import has_float64
from megatron_replay.optim.blocks import cuts

Scope = Literal["global", "layer", "tensor"]
"""The extent over which a gradient is compared with its momentum: the whole model, a layer, or each tensor."""

_CHUNK = 4096
"""Number of products that are added up in float32 where there is no float64."""

COLUMNS = ("sum m g", "sum m^2", "sum g^2", "sum u^2", "elements")
"""The columns of a row of the table.

m is the momentum before the step, g the gradient, u the direction of the step before. `elements` is the number of
elements of u.
"""


def sums_of_each(grads: Sequence[Tensor], momenta: Sequence[Tensor | None], *, mode: str) -> Tensor:
    """`tensor_sums` of each pair, [n, 3] float64, on the device where that puts them; n is at least 1.

    The compiled kernel computes them if `mode` and the pairs allow it.
    """
    if tensor_updates.summable(grads, momenta, mode=mode):
        return tensor_updates.sums(grads, momenta)
    return torch.stack([tensor_sums(g, m) for g, m in zip(grads, momenta, strict=True)])


def tensor_sums(grad: Tensor, momentum: Tensor | None = None) -> Tensor:
    """The row (sum m g, sum m^2, sum g^2) of one tensor or shard, [3] float64; no momentum counts as zero.

    Both tensors are read once; temporaries are two blocks of float64. The row lies on their device, or on the cpu where
    that has no float64.
    """
    g = grad.reshape(-1)
    m = None if momentum is None else momentum.reshape(-1)
    zero = torch.zeros((), dtype=torch.float64, device=home(g.device))
    rows = []
    for cut in cuts(g.numel(), g.device):
        wide = _wide(g[cut])
        if m is None:
            rows += [zero, zero, _dot(wide, wide)]
        else:
            wide_m = _wide(m[cut])
            rows += [_dot(wide_m, wide), _dot(wide_m, wide_m), _dot(wide, wide)]
    return torch.stack(rows).view(-1, 3).sum(0) if rows else zero.expand(3)


def sum_of_squares(values: Tensor) -> Tensor:
    """The sum of squares, [] float64, on the device where `tensor_sums` would put it."""
    if has_float64(values.device):
        squares: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64).square()
        return squares
    flat = values.reshape(-1).float()
    return _dot(flat, flat)


def home(device: torch.device) -> torch.device:
    """The device on which float64 sums of this device's tensors lie."""
    return device if has_float64(device) else torch.device("cpu")


def _wide(values: Tensor) -> Tensor:
    return values.double() if has_float64(values.device) else values.float()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float64:
        return a.dot(b)
    products = a * b
    whole = products.numel() // _CHUNK * _CHUNK
    parts = torch.cat([products[:whole].view(-1, _CHUNK).sum(1), products[whole:].sum()[None]])
    return parts.cpu().double().sum()


def grouped(sums: Tensor, layers: Sequence[int], *, scope: Scope) -> tuple[Tensor, Tensor]:
    """Sums [groups, 3] of a scope, and the group of each row [rows]."""
    rows = sums.shape[0]
    if scope == "tensor":
        return sums, torch.arange(rows)
    labels = torch.zeros(rows, dtype=torch.long)
    if scope == "layer":
        labels = torch.unique(torch.tensor(layers, dtype=torch.long), return_inverse=True)[1]
    num_groups = int(labels.max()) + 1 if rows else 0
    return torch.zeros(num_groups, 3, dtype=sums.dtype).index_add_(0, labels, sums), labels


def cosines(c: Tensor, mm: Tensor, gg: Tensor) -> Tensor:
    """Cosine [groups] between momentum and gradient of each group, from its sums as in `COLUMNS`.

    It is nan where one of them is zero.
    """
    known = (mm > 0) & (gg > 0)
    one = torch.ones_like(c)
    x = (c / (mm.where(known, one).sqrt() * gg.where(known, one).sqrt())).clamp(-1, 1)
    return x.where(known, torch.full_like(x, math.nan))


def clip_factor(norm: float, limit: float) -> float:
    """The factor that makes a gradient of this norm at most about `limit` long (Megatron's rule); 1 if limit is 0."""
    assert math.isfinite(norm), "a gradient that is not finite is skipped, not clipped"
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0
