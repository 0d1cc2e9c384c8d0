"""All that the maths knows of tensor parallelism: the vocabulary rows that are here, and collectives.

The collectives do nothing where there is no group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.errors import LayoutError


@dataclass(frozen=True)
class Stripes:
    """A fixed order of `rows` vocabulary rows: id v lies in row (v mod count) (rows / count) + v div count.

    Tokenizers number their tokens by frequency, so contiguous shards leave nearly all of a text's ids on the first
    rank. Stripes deal neighbouring ids to different ranks. One order serves every number of ranks that divides `count`,
    and is right for any other.
    """

    rows: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.rows % self.count:
            raise LayoutError(
                f"{self.rows} vocabulary rows do not divide into {self.count} stripes; pad the vocabulary to a multiple"
            )

    @property
    def width(self) -> int:
        """Rows of a stripe."""
        return self.rows // self.count

    def row_of(self, ids: Tensor) -> Tensor:
        """The row of each id in 0..rows-1, in the ids' dtype."""
        return ids % self.count * self.width + ids // self.count

    def id_of(self, rows: Tensor) -> Tensor:
        """The id in each row: the inverse of `row_of`."""
        return rows % self.width * self.count + rows // self.width


@dataclass(frozen=True)
class VocabShard:
    """The vocabulary rows `start <= row < stop` of this rank.

    The other rows are on the other ranks of `group`; with None there are no others. A row's number is its id, unless
    `stripes` says otherwise.

    Every operator has one code path for a whole and for a sharded vocabulary in either order. Without a group the
    collectives are the identity, and without stripes rows and ids are the same.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    stripes: Stripes | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise LayoutError(f"a vocabulary shard needs 0 <= start <= stop, got start {self.start}, stop {self.stop}")
        if self.stripes is not None and self.stop > self.stripes.rows:
            raise LayoutError(
                f"a vocabulary shard up to row {self.stop} needs as many rows, the stripes have {self.stripes.rows}"
            )

    @classmethod
    def of_rank(cls, rows: int, group: dist.ProcessGroup, *, stripes: int = 1) -> VocabShard:
        """The even contiguous part of `rows` vocabulary rows that this rank of `group` holds.

        The rows may be laid out in stripes. Raises LayoutError when the ranks or the stripes do not divide the rows.
        """
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        if rows % ranks:
            raise LayoutError(
                f"{rows} vocabulary rows do not divide over {ranks} ranks; pad the vocabulary to a multiple of {ranks}"
            )
        each = rows // ranks
        return cls(rank * each, (rank + 1) * each, group, Stripes(rows, stripes) if stripes > 1 else None)

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """True where nobody else holds vocabulary rows."""
        return self.group is None

    def columns(self, ids: Tensor) -> Tensor:
        """The column of each id in this shard, -1 where it is not here; in the ids' shape and dtype."""
        rows = ids
        if self.stripes is not None:  # no row lies below 0
            rows = torch.where((ids >= 0) & (ids < self.stripes.rows), self.stripes.row_of(ids), -1)
        return torch.where((rows >= self.start) & (rows < self.stop), rows - self.start, -1)

    def by_id(self, logits: Tensor, vocab_size: int | None = None) -> tuple[Tensor, Tensor]:
        """This shard's columns of `logits` [N, V] in the order of their ids, and the ids [n].

        The ids are those below `vocab_size` (None: all). The columns are a view where rows lie by id. Otherwise they
        are a copy, whose columns tie as their ids do.
        """
        if self.stripes is None:
            end = self.stop if vocab_size is None else min(max(vocab_size, self.start), self.stop)
            return logits[:, : end - self.start], torch.arange(self.start, end, device=logits.device)
        end = self.stripes.rows if vocab_size is None else min(vocab_size, self.stripes.rows)
        ids = torch.arange(end, device=logits.device)
        columns = self.columns(ids)
        here = columns >= 0
        return logits.index_select(1, columns[here]), ids[here]

    def padding(self, vocab_size: int | None, device: torch.device) -> Tensor:
        """[n] int64: the columns that belong to no real id; `vocab_size` is the first id that is not real."""
        rows = torch.arange(self.start, self.stop, device=device)
        ids = rows if self.stripes is None else self.stripes.id_of(rows)
        return rows[:0] if vocab_size is None else (ids >= vocab_size).nonzero()[:, 0]

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
        """Each tensor of every rank, stacked as [ranks, *shape] in rank order.

        It takes one collective for all of them, whatever their dtypes. Shapes must agree between the ranks.
        """
        if self.group is None:
            return tuple(t[None] for t in tensors)
        packed = _packed([t[None] for t in tensors])
        parts = packed.new_empty(dist.get_world_size(self.group), packed.shape[1])
        dist.all_gather(list(parts.unbind()), packed[0], group=self.group)
        return _unpacked(parts, tensors, (len(parts),))

    def own_rows(self, num: int) -> slice:
        """This rank's part of `num` rows, where the group divides work among its ranks."""
        if self.group is None:
            return slice(0, num)
        rank = dist.get_rank(self.group)
        return self._row_ranges(num)[rank]

    def deal(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This rank's part of the rows of tensors [N, ...], as each rank has them: [ranks, n, ...] in rank order.

        One collective.
        """
        if self.group is None:
            return tuple(t[None] for t in tensors)
        sizes = [rows.stop - rows.start for rows in self._row_ranges(len(tensors[0]))]
        mine = sizes[dist.get_rank(self.group)]
        packed = _packed(tensors)
        parts = packed.new_empty(len(sizes) * mine, packed.shape[1])
        dist.all_to_all_single(parts, packed, [mine] * len(sizes), sizes, group=self.group)
        return _unpacked(parts, [t.new_empty(t.shape[1:]) for t in tensors], (len(sizes), mine))

    def join(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors [n, ...] of all ranks, each concatenated in rank order; n may differ between ranks and tensors.

        Two collectives.
        """
        if self.group is None:
            return tensors
        (lengths,) = self.gather(torch.tensor([len(t) for t in tensors], device=tensors[0].device))
        longest = lengths.amax(0).tolist()
        room = [t.new_zeros(most, *t.shape[1:]) for t, most in zip(tensors, longest, strict=True)]
        for padded, tensor in zip(room, tensors, strict=True):
            padded[: len(tensor)] = tensor
        columns = zip(self.gather(*room), lengths.t().tolist(), strict=True)
        return tuple(
            torch.cat([part[:length] for part, length in zip(parts, some, strict=True)]) for parts, some in columns
        )

    def _row_ranges(self, num: int) -> list[slice]:
        ranks = dist.get_world_size(self.group)
        return [slice(num * rank // ranks, num * (rank + 1) // ranks) for rank in range(ranks)]


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [N, ...] side by side as bytes [N, B]: float32 values, int32 ids and float64 sums go as one tensor."""
    return torch.cat([t.reshape(t.shape[0], math.prod(t.shape[1:])).contiguous().view(torch.uint8) for t in tensors], 1)


def _unpacked(rows: Tensor, like: Sequence[Tensor], outer: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Bytes [prod(outer), B] as tensors [*outer, *shape] of the shapes and dtypes of `like`."""
    columns = rows.split([t.numel() * t.element_size() for t in like], dim=1)
    # copies: bytes in the middle of a buffer may lie at an address that the dtype cannot have
    flat = (c.clone(memory_format=torch.contiguous_format).flatten() for c in columns)
    return tuple(f.view(t.dtype).view(*outer, *t.shape) for f, t in zip(flat, like, strict=True))


def shard_of(columns: int, shard: VocabShard | None) -> VocabShard:
    """`shard`, or the whole vocabulary of `columns` ids.

    Raises LayoutError when the shard is not as wide as the tensor.
    """
    if shard is None:
        return VocabShard(0, columns)
    if shard.size != columns:
        raise LayoutError(
            f"the shard covers ids {shard.start}..{shard.stop} ({shard.size} rows), but the tensor has {columns}"
        )
    return shard
