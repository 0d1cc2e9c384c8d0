"""The candidate sets of one sample, in numpy, and the structure that makes them valid.

P positions of the sample, nnz ids over all of them, V the real vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_replay.candidates import SetRecord
from megatron_replay.errors import StoreError
from megatron_replay.ragged import per_entry, per_position

MAX_SET = 65_535
"""Most ids in one position's set."""
MAX_IDS = 1 << 28
"""Most ids in one sample. A block may hold twice as many; a reader is ready to allocate for that."""
MAX_POSITIONS = 1 << 26
"""Most positions in one sample; a block may hold twice as many."""
MAX_VOCAB = 1 << 32

Array = NDArray[Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class SampleSets(SetRecord[Array]):
    """The candidate sets of one sample; position p (0-based) predicts token p + 1.

    `offsets`, `ids`, `gold_slot`, `lse` and `outside_mass` are as in `SetRecord`; `ids` are uint32 where the vocabulary
    exceeds 2^31.
    """

    positions: Array = field(metadata=per_position("int32"))
    """[P] int32, strictly ascending."""
    logits: Array | None = field(default=None, metadata=per_entry("float32"))
    """[nnz] float32 in the order of `ids` (stored as the manifest says), or None."""
    gold_appended: Array | None = field(default=None, metadata=per_position("bool"))
    """[P] bool: true where the gold token was not among the kept top tokens.

    None on writing: the writer works it out where it can.
    """

    @property
    def num_positions(self) -> int:
        return len(self.positions)

    @classmethod
    def cat(cls, parts: Sequence[SampleSets]) -> SampleSets:
        """The positions of all parts, one at least, in order."""
        return cls.joined(parts, np.concatenate)


def check_structure(sets: SampleSets, vocab_size: int, name: str) -> None:
    """Raise StoreError, naming the sample and the position, unless the sets have the structure that they should."""
    count = len(sets.positions)
    for column, length in sets.misfits(count, len(sets.ids)):
        raise StoreError(f"{name}: {column} has shape {getattr(sets, column).shape}, expected ({length},)")
    _integers(sets, name)
    offsets = sets.offsets.astype(np.int64)
    sizes = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(sets.ids):
        raise StoreError(
            f"{name}: offsets run from {offsets[0]} to {offsets[-1]}, but there are {len(sets.ids)} ids; they must "
            "run from 0 to that"
        )
    if len(sets.ids) > MAX_IDS or count > MAX_POSITIONS:
        raise StoreError(
            f"{name}: {len(sets.ids)} ids at {count} positions; a sample holds at most {MAX_IDS} ids, {MAX_POSITIONS} "
            "positions"
        )
    positions = sets.positions.astype(np.int64)
    refuse(name, positions, (positions < 0) | (positions >= 1 << 31), "position outside 0..2^31-1")
    refuse(name, positions[1:], np.diff(positions) <= 0, "positions must be strictly ascending")
    refuse(
        name, positions, (sizes < 1) | (sizes > MAX_SET), f"a set holds 1..{MAX_SET} ids (the gold token is always in)"
    )
    refuse(name, positions, (sets.gold_slot < 0) | (sets.gold_slot >= sizes), "gold_slot lies outside the set")
    _check_ids(sets.ids.astype(np.int64), offsets, positions, vocab_size, name)


def refuse(name: str, positions: Array, wrong: Array, problem: str) -> None:
    """Raise StoreError naming the first of the positions that is wrong."""
    where = np.flatnonzero(wrong)
    if len(where):
        raise StoreError(f"{name}, position {positions[where[0]]}: {problem}")


def _integers(sets: SampleSets, name: str) -> None:
    types = sets.dtypes()
    for column, array in sets.columns().items():
        if types[column].startswith("int") and array.dtype.kind not in "iu":
            raise StoreError(f"{name}: {column} must hold integers, got {array.dtype}")


def _check_ids(ids: Array, offsets: Array, positions: Array, vocab_size: int, name: str) -> None:
    if not len(ids):
        return
    step = np.diff(ids, prepend=-1)
    step[offsets[:-1]] = 1
    bad = np.flatnonzero((step <= 0) | (ids < 0) | (ids >= vocab_size))
    if len(bad):
        at = positions[np.searchsorted(offsets, bad[0], side="right") - 1]
        raise StoreError(
            f"{name}, position {at}: id {ids[bad[0]]} is out of order or outside the vocabulary of {vocab_size}"
        )
