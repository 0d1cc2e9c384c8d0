"""The exact k-th largest magnitude of a tensor of which every rank holds a part: radix selection on histograms.

Non-negative floats order as their bits do. Each round looks at the values that begin with the bits chosen so far. It
counts their next bits, adds the counts of all ranks, and picks the bucket that holds the k-th largest. float32 (31
bits) takes three rounds, float64 (63) seven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WIDTH = 11
"""Most bits of a round: the exponent of a float64."""
_SHIFTS = {torch.float32: (20, 10, 0), torch.float64: (52, 42, 32, 22, 12, 2, 0)}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class ShardValues:
    """This rank's values of a logical tensor."""

    values: Tensor
    """Any shape, float32 or float64; signs are ignored."""
    row: int
    counted: bool
    """False for a replica that another rank counts."""


def thresholds(
    shards: Sequence[ShardValues], rows: int, fraction: float, add: Callable[[Tensor], Tensor]
) -> list[float]:
    """The magnitude of the k-th largest element of each of `rows` logical tensors; 0 for empty ones.

    k = ceil(fraction n) >= 1. `add` sums a float64 table [rows, 2049] over all ranks (counts are exact in float64).
    Every rank calls it as often as the widest dtype among the shards of all ranks needs, so a rank without shards keeps
    pace.
    """
    left = [0] * rows
    chosen = [0] * rows
    rounds, step = 1, 0
    doubles = [False] * rows
    while step < rounds:
        table = torch.zeros(rows, (1 << _WIDTH) + 1, dtype=torch.float64)
        for shard in shards:
            if shard.counted:
                table[shard.row, :-1] += _counts(shard.values, step, chosen[shard.row])
                table[shard.row, -1] += shard.values.dtype == torch.float64
        table = add(table).cpu()
        if step == 0:
            doubles = (table[:, -1] > 0).tolist()
            rounds = len(_SHIFTS[torch.float64 if any(doubles) else torch.float32])
        for row in range(rows):
            shifts = _SHIFTS[torch.float64 if doubles[row] else torch.float32]
            if step < len(shifts):
                counts = table[row, :-1].long()
                left[row] = left[row] if step else _kept(int(counts.sum()), fraction)
                chosen[row], left[row] = _descend(counts, chosen[row], left[row], _width(shifts, step))
        step += 1
    return [_value(bits, double) for bits, double in zip(chosen, doubles, strict=True)]


def _kept(elements: int, fraction: float) -> int:
    # fraction * n may come out a hair above a whole number
    return min(elements, max(1, -int(-fraction * elements * (1 - 1e-12) // 1))) if elements else 0


def _width(shifts: Sequence[int], step: int) -> int:
    return _WIDTH if step == 0 else shifts[step - 1] - shifts[step]


def _counts(values: Tensor, step: int, prefix: int) -> Tensor:
    """Number of magnitudes that begin with `prefix` and go on with each value of the round's bits: [2048]."""
    shifts = _SHIFTS[values.dtype]
    if step >= len(shifts):
        return torch.zeros(1 << _WIDTH, dtype=torch.float64)
    width = _width(shifts, step)
    keys = values.detach().abs().view(-1).view(_BITS[values.dtype]) >> shifts[step]
    if step:
        keys = keys[keys >> width == prefix] & ((1 << width) - 1)
    return torch.bincount(keys, minlength=1 << _WIDTH).double().cpu()


def _descend(counts: Tensor, prefix: int, left: int, width: int) -> tuple[int, int]:
    """The bits so far with those of the `left`-th largest's bucket, and how many of the bucket are still to take."""
    above = counts.flip(0).cumsum(0).flip(0) - counts
    bucket = int((above < left).nonzero()[0]) if left else 0
    return prefix << width | bucket, left - int(above[bucket])


def _value(bits: int, double: bool) -> float:
    kind = torch.float64 if double else torch.float32
    return float(torch.tensor(bits, dtype=_BITS[kind]).view(kind))
