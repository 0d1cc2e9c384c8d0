"""Flat blocks of a parameter: temporaries stay as small as a block, and the cuts do not change the result.

On CPU torch computes the last elements of each thread's loop (fewer than two vector registers) by scalar code. The
scalar arctangent differs from the vectorised one in the last bit. So a parameter cut elsewhere by sharding would train
to other bits. `padded` therefore lengthens the scratch vectors until no element falls in such a remainder. The other
operations used (one IEEE rounding each) are the same in both loops.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_GRAIN = 32_768
"""The fewest elements of an elementwise loop that torch gives a thread."""
_LANES = 64
"""A multiple of two vector registers of float32 on every CPU torch vectorises for."""
_CPU_BLOCK = 65_536
"""Elements of a block for one thread: five float32 vectors of it fit a level-2 cache."""
_DEVICE_BLOCK = 1 << 24


def block_size(device: torch.device) -> int:
    """Elements to process at a time on this device."""
    return _CPU_BLOCK * torch.get_num_threads() if device.type == "cpu" else _DEVICE_BLOCK


def padded(length: int) -> int:
    """The next length at which every thread's part of an elementwise loop is a whole number of vector registers."""
    threads = min(torch.get_num_threads(), -(-length // _GRAIN))
    unit = _LANES * max(threads, 1)
    return -(-length // unit) * unit


def cuts(length: int, device: torch.device) -> Iterator[slice]:
    """Slices of a flat vector, one block each."""
    size = block_size(device)
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class Scratch:
    """Two vectors as long as the blocks of one parameter."""

    def __init__(self, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        self._pair = torch.empty(2, padded(min(longest, block_size(device))), dtype=dtype, device=device)

    def vectors(self, length: int) -> tuple[Tensor, Tensor]:
        """Two scratch vectors of at least `length` elements, padded; they hold the values of their last use."""
        first, second = self._pair[:, : padded(length)]
        return first, second
