"""Candidate sets: for each position the few ids that the restricted loss looks at, as one ragged table.

N positions, nnz ids in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_replay.candidates import SetRecord
from megatron_replay.errors import DataError
from megatron_replay.ops.local_sets import LocalSets
from megatron_replay.ops.shard import VocabShard


@dataclass(frozen=True, eq=False)
class CandidateSets(SetRecord[Tensor]):
    """The ids kept at each position, the gold one among them, and the mass left out. The same on every rank.

    `offsets` [N+1] int64, `ids` [nnz] int32, `gold_slot` [N] int32, `logits` [nnz] float32 or None, `lse` [N] float32
    and `outside_mass` [N] float32; `SetRecord` describes them.
    """

    @classmethod
    def from_arrays(
        cls,
        offsets: Any,
        ids: Any,
        gold_slot: Any,
        logits: Any = None,
        lse: Any = None,
        outside_mass: Any = None,
        **further: Any,
    ) -> CandidateSets:
        """Sets from numpy arrays, tensors or lists of any integer or float type.

        `lse` and `outside_mass` default to 0.
        """
        zeros = torch.zeros_like(torch.as_tensor(gold_slot))
        lse, outside_mass = (zeros if values is None else values for values in (lse, outside_mass))
        return cls.of(cls(offsets, ids, gold_slot, logits, lse, outside_mass, **further))

    @classmethod
    def of(cls, record: SetRecord[Any]) -> CandidateSets:
        """The record's columns as tensors of the declared types: numpy's int32 and float32 share their memory."""
        tensors: dict[str, Any] = {}
        for name, dtype in cls.dtypes().items():
            array = getattr(record, name)
            tensors[name] = None if array is None else torch.as_tensor(array).to(getattr(torch, dtype))
        return cls(**tensors)

    @classmethod
    def from_lists(cls, ids: Sequence[Sequence[int]], gold: Sequence[int]) -> CandidateSets:
        """Sets from one list of ids per position, in any order, and the gold id of each.

        Raises DataError when a gold id is not in its set.
        """
        if len(ids) != len(gold):
            raise DataError(f"{len(ids)} candidate sets but {len(gold)} gold ids")
        rows = [sorted(set(row)) for row in ids]
        for at, (row, target) in enumerate(zip(rows, gold, strict=True)):
            if target not in row:
                raise DataError(f"position {at}: the gold id {target} is not among its candidates; add it")
        lengths = torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int64)
        flat = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        return cls.from_arrays(
            lengths.cumsum(0),
            flat,
            torch.tensor([r.index(g) for r, g in zip(rows, gold, strict=True)], dtype=torch.int32),
        )

    @classmethod
    def cat(cls, parts: Sequence[CandidateSets]) -> CandidateSets:
        """The positions of all parts in order; logits are kept when every part has them."""
        if not parts:
            return cls.from_arrays([0], torch.empty(0), torch.empty(0))
        return cls.joined(parts, torch.cat)

    def gold(self) -> Tensor:
        """[N] int64: the gold ids."""
        return super().gold().long()

    def to(self, device: torch.device | str) -> CandidateSets:
        return self.map(lambda tensor: tensor.to(device))

    def check(self, vocab: int) -> CandidateSets:
        """Raise DataError at the first broken rule; returns itself.

        The rules are about shapes, offsets, order, range below `vocab`, and gold slot.
        """
        n, nnz = self.num_positions, self.ids.shape[0]
        for name, _ in self.misfits(n, nnz):
            raise DataError(
                f"candidate sets: {name} has shape {tuple(getattr(self, name).shape)}, but there are {n} positions and "
                f"{nnz} ids"
            )
        sizes = self.sizes()
        if n < 0 or int(self.offsets[0]) != 0 or int(self.offsets[-1]) != nnz or bool((sizes < 0).any()):
            raise DataError(f"candidate sets: offsets must rise from 0 to the {nnz} ids")
        _refuse((sizes < 1), "position {at} has no ids; a set holds at least its gold id")
        _refuse((self.gold_slot < 0) | (self.gold_slot >= sizes), "gold_slot of position {at} lies outside its set")
        row = torch.repeat_interleave(sizes)
        wrong = (self.ids < 0) | (self.ids >= vocab)
        _refuse(wrong, f"entry {{at}} is not an id of a vocabulary of {vocab}; is this another tokenizer's store?")
        _refuse((self.ids.diff() <= 0) & (row.diff() == 0), "ids after entry {at} do not ascend within their position")
        return self

    def local(self, shard: VocabShard, *, targets: Tensor | None = None, weights: Tensor | None = None) -> LocalSets:
        """The ids in `shard`, as columns of its weight.

        They come with the targets [nnz] of the ids and the weights [N] of the positions, where the loss has them (see
        `LocalSets`). Raises DataError for an id outside a shard that is the whole vocabulary, or targets or weights of
        another shape.
        """
        for name, values, like in (("targets", targets, self.ids), ("weights", weights, self.gold_slot)):
            if values is not None and values.shape != like.shape:
                raise DataError(
                    f"candidate sets: {name} has shape {tuple(values.shape)}, but there are {self.num_positions} "
                    f"positions and {len(self.ids)} ids"
                )
        columns = shard.columns(self.ids)
        mine = columns >= 0
        at = self.offsets[:-1] + self.gold_slot
        if bool(mine.all()):
            return LocalSets(self.offsets, columns, at, targets=targets, weights=weights)
        if shard.is_whole:
            bad = int(self.ids[~mine][0])
            raise DataError(
                f"candidate id {bad} lies outside the vocabulary rows {shard.start}..{shard.stop} of the model"
            )
        before = torch.cat([mine.new_zeros(1, dtype=torch.int64), mine.cumsum(0)])
        kept = None if targets is None else targets[mine]
        gold = torch.where(mine[at], before[at], -1)
        return LocalSets(before[self.offsets], columns[mine], gold, targets=kept, weights=weights)


def _refuse(bad: Tensor, message: str) -> None:
    if bool(bad.any()):
        raise DataError("candidate sets: " + message.format(at=int(bad.nonzero()[0, 0])))
