"""All that the maths knows of tensor parallelism: which rows of the vocabulary are here, and three collectives that do nothing alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import LayoutError


@dataclass(frozen=True)
class VocabShard:
    """Vocabulary rows `start <= id < stop` of this rank; the other rows are on the other ranks of `group` (None: nobody else).

    Every operator has one code path for a whole and for a sharded vocabulary: without a group the collectives are the identity.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise LayoutError(f"a vocabulary shard needs 0 <= start <= stop, got start {self.start}, stop {self.stop}")

    @classmethod
    def of_rank(cls, rows: int, group: dist.ProcessGroup) -> VocabShard:
        """The even contiguous share of `rows` vocabulary rows that this rank of `group` holds.

        Raises LayoutError when the ranks do not divide the rows.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if rows % ranks:
            raise LayoutError(f"{rows} vocabulary rows do not divide over {ranks} ranks; pad the vocabulary to a multiple of {ranks}")
        share = rows // ranks
        return cls(rank * share, (rank + 1) * share, group)

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Nobody else holds vocabulary rows."""
        return self.group is None

    def max_(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the group, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over the group, in place."""
        if self.group is not None:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def gather(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each tensor of every rank, stacked as [ranks, *shape] in rank order; one collective for all of them, whatever their dtypes.

        Shapes must agree between the ranks.
        """
        if self.group is None:
            return tuple(t[None] for t in tensors)
        # bytes, so that float32 values, int32 ids and float64 sums travel together
        packed = torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])
        parts = [torch.empty_like(packed) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, packed, group=self.group)
        columns = torch.stack(parts).split([t.numel() * t.element_size() for t in tensors], dim=1)
        return tuple(_aligned(c).view(t.dtype).view(len(parts), *t.shape) for c, t in zip(columns, tensors, strict=True))


def _aligned(columns: Tensor) -> Tensor:
    """A flat copy: a piece in the middle of a buffer may lie at an address its dtype cannot have."""
    return columns.clone(memory_format=torch.contiguous_format).flatten()


def shard_of(columns: int, shard: VocabShard | None) -> VocabShard:
    """`shard`, or the whole vocabulary of `columns` ids. Raises LayoutError when the shard is not as wide as the tensor."""
    if shard is None:
        return VocabShard(0, columns)
    if shard.size != columns:
        raise LayoutError(f"the shard covers ids {shard.start}..{shard.stop} ({shard.size} rows), but the tensor has {columns}")
    return shard


def num_real(shard: VocabShard, vocab_size: int | None) -> int:
    """How many of this shard's columns are real ids, that is below `vocab_size`."""
    return shard.size if vocab_size is None else min(max(vocab_size - shard.start, 0), shard.size)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether torch computes in float64 on this device itself; an NPU would send such operators to the host, one by one."""
    return device.type in ("cpu", "cuda")


def rows_within(budget: int, row_bytes: int) -> int:
    """How many rows of `row_bytes` fit in `budget` bytes, at least one."""
    return max(1, budget // math.ceil(max(row_bytes, 1)))
