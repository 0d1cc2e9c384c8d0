"""The candidate sets of one sample, in numpy, and what makes them valid.

P positions of the sample, nnz ids over all of them, V the real vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_replay.errors import StoreError

MAX_SET = 65_535
"""Ids in one position's set."""
MAX_IDS = 1 << 28
"""Ids in one sample. A block may hold twice as many: that is what a reader is ready to allocate for."""
MAX_POSITIONS = 1 << 26
"""Positions in one sample; a block may hold twice as many."""
MAX_VOCAB = 1 << 32

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class SampleSets:
    """The candidate sets of one sample; position p (0-based) predicts token p + 1."""

    positions: Array
    """[P] int32, strictly ascending."""
    offsets: Array
    """[P + 1] int64: the ids of position i are ids[offsets[i]:offsets[i + 1]]."""
    ids: Array
    """[nnz] int32 (uint32 where the vocabulary exceeds 2^31), strictly ascending within a position."""
    gold_slot: Array
    """[P] int32: where in its set the gold token stands."""
    lse: Array
    """[P] float32: log-sum-exp of the base model's logits over the whole vocabulary."""
    outside_mass: Array
    """[P] float32 in [0, 1]: probability outside the set (stored as float16)."""
    logits: Array | None = None
    """[nnz] float32 in the order of `ids` (stored as the manifest says), or None."""
    gold_appended: Array | None = None
    """[P] bool: the gold token was not among the kept top tokens. None on writing: the writer works it out where it
    can."""

    @property
    def num_positions(self) -> int:
        return len(self.positions)

    def sizes(self) -> Array:
        """[P] int64: ids in each set."""
        sizes: Array = np.diff(self.offsets)
        return sizes

    def gold(self) -> Array:
        """[P]: the gold token ids."""
        gold: Array = self.ids[self.offsets[:-1] + self.gold_slot]
        return gold


def check(sets: SampleSets, vocab_size: int, name: str) -> None:
    """Raise StoreError, naming the sample and the position, unless the sets can be stored and read back as they are."""
    count = len(sets.positions)
    for field, length in (("offsets", count + 1), ("gold_slot", count), ("lse", count), ("outside_mass", count)):
        _length(getattr(sets, field), length, field, name)
    _integers(sets, name)
    offsets = sets.offsets.astype(np.int64)
    sizes = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(sets.ids):
        raise StoreError(
            f"{name}: offsets run from {offsets[0]} to {offsets[-1]}, but there are {len(sets.ids)} ids; they must "
            "run from 0 to that"
        )
    if sets.logits is not None:
        _length(sets.logits, len(sets.ids), "logits", name)
    if sets.gold_appended is not None:
        _length(sets.gold_appended, count, "gold_appended", name)
    if len(sets.ids) > MAX_IDS or count > MAX_POSITIONS:
        raise StoreError(
            f"{name}: {len(sets.ids)} ids at {count} positions; a sample holds at most {MAX_IDS} ids, {MAX_POSITIONS} "
            "positions"
        )
    positions = sets.positions.astype(np.int64)
    _refuse(name, positions, (positions < 0) | (positions >= 1 << 31), "position outside 0..2^31-1")
    _refuse(name, positions[1:], np.diff(positions) <= 0, "positions must be strictly ascending")
    _refuse(
        name, positions, (sizes < 1) | (sizes > MAX_SET), f"a set holds 1..{MAX_SET} ids (the gold token is always in)"
    )
    _refuse(name, positions, (sets.gold_slot < 0) | (sets.gold_slot >= sizes), "gold_slot lies outside the set")
    _check_ids(sets.ids.astype(np.int64), offsets, positions, vocab_size, name)
    _refuse(name, positions, ~np.isfinite(sets.lse), "lse is not finite")
    rho = sets.outside_mass.astype(np.float32)
    _refuse(name, positions, ~((rho >= -1e-3) & (rho <= 1.001)), "outside_mass is not a probability")


def _length(array: Array, length: int, field: str, name: str) -> None:
    if array.shape != (length,):
        raise StoreError(f"{name}: {field} has shape {array.shape}, expected ({length},)")


def _integers(sets: SampleSets, name: str) -> None:
    for field in ("positions", "offsets", "ids", "gold_slot"):
        array = getattr(sets, field)
        if array.dtype.kind not in "iu":
            raise StoreError(f"{name}: {field} must hold integers, got {array.dtype}")


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


def _refuse(name: str, positions: Array, wrong: Array, problem: str) -> None:
    where = np.flatnonzero(wrong)
    if len(where):
        raise StoreError(f"{name}, position {positions[where[0]]}: {problem}")
