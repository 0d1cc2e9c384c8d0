"""Compare what two stores hold. Segments, order, writers and codecs do not matter, contents do."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from megatron_replay.store.reader import CandidateStore
from megatron_replay.store.sample_sets import SampleSets

EXAMPLES = 5


@dataclass(frozen=True)
class Difference:
    """One position whose set differs; both empty where only the position itself, or the gold token, does."""

    uid: bytes
    position: int
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]


@dataclass
class Comparison:
    """Counts over the samples of two stores."""

    samples_a: int
    samples_b: int
    positions_a: int
    positions_b: int
    identical: int = 0
    """Positions of both stores with the same ids and the same gold token."""
    differing: int = 0
    """Positions, of samples in both stores, whose sets are not the same or that only one of them has."""
    examples: list[Difference] = field(default_factory=list)
    missing_a: list[bytes] = field(default_factory=list)
    """Uids only in b."""
    missing_b: list[bytes] = field(default_factory=list)
    max_lse_difference: float = 0.0

    @property
    def same(self) -> bool:
        """The same samples, positions and sets (lse is reported, not judged: it depends on the order of summation)."""
        return not (self.differing or self.missing_a or self.missing_b)


def compare(a: CandidateStore, b: CandidateStore) -> Comparison:
    """Compare two open stores sample by sample. Raises StoreError where either is damaged."""
    found = Comparison(len(a), len(b), a.stats().positions, b.stats().positions)
    found.missing_a = [uid for uid in b if uid not in a]
    for uid in a:
        if uid in b:
            _sample(uid, a[uid], b[uid], found)
        else:
            found.missing_b.append(uid)
    return found


def _sample(uid: bytes, a: SampleSets, b: SampleSets, found: Comparison) -> None:
    both, in_a, in_b = np.intersect1d(a.positions, b.positions, assume_unique=True, return_indices=True)
    if len(both):
        found.max_lse_difference = max(found.max_lse_difference, float(np.abs(a.lse[in_a] - b.lse[in_b]).max()))
    if (
        np.array_equal(a.positions, b.positions)
        and np.array_equal(a.offsets, b.offsets)
        and np.array_equal(a.ids, b.ids)
    ):
        same = a.gold_slot == b.gold_slot
        found.identical += int(same.sum())
        _differ(uid, [(int(p), (), ()) for p in a.positions[~same]], found)
        return
    different: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for position, i, j in zip(both.tolist(), in_a.tolist(), in_b.tolist(), strict=True):
        ids_a, ids_b = a.ids[a.offsets[i] : a.offsets[i + 1]], b.ids[b.offsets[j] : b.offsets[j + 1]]
        if np.array_equal(ids_a, ids_b) and a.gold_slot[i] == b.gold_slot[j]:
            found.identical += 1
        else:
            different.append(
                (position, tuple(np.setdiff1d(ids_a, ids_b).tolist()), tuple(np.setdiff1d(ids_b, ids_a).tolist()))
            )
    different += [(position, (), ()) for position in np.setxor1d(a.positions, b.positions).tolist()]
    _differ(uid, different, found)


def _differ(uid: bytes, different: list[tuple[int, tuple[int, ...], tuple[int, ...]]], found: Comparison) -> None:
    found.differing += len(different)
    room = EXAMPLES - len(found.examples)
    found.examples += [Difference(uid, *each) for each in different[: max(room, 0)]]
