"""Counts of what a store holds: kept beside each segment's blocks, so that footers alone sum up a store of any size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_replay.candidates import CandidateRule
from megatron_replay.store.block import SampleBlock
from megatron_replay.store.sample_sets import Array, SampleSets

RHO_EDGES = (0.0, 1e-4, 1e-3, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
"""Bins of the outside mass rho, the last one closed."""
SIZE_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 97, 129, 161, 193, 257, 513, 1025, 4097, 16385, 65536)
"""Bins of the set size in the manifest; a segment's footer keeps every size by itself."""


@dataclass
class Stats:
    """Counts over samples, positions and ids."""

    samples: int = 0
    positions: int = 0
    ids: int = 0
    capped: int = 0
    """Positions whose set stopped at k_max before reaching tau, where Corollary 1 fails.

    They have at least k_max ids, and rho above 1 - tau.
    """
    gold_appended: int = 0
    sizes: Array = field(default_factory=lambda: np.zeros(2, np.int64))
    """[largest size + 1]: positions with a set of that size."""
    rho: Array = field(default_factory=lambda: np.zeros(len(RHO_EDGES) - 1, np.int64))

    def add(self, block: SampleBlock, rule: CandidateRule) -> None:
        sizes, mass = block.sets.sizes(), block.sets.outside_mass
        self.samples += len(block.uids)
        self.positions += len(sizes)
        self.ids += len(block.sets.ids)
        self.capped += int(((sizes >= rule.k_max) & (mass > np.float32(np.float16(1 - rule.tau)))).sum())
        self.gold_appended += int(block.sets.columns()["gold_appended"].sum())
        self.sizes = _sum(self.sizes, np.bincount(sizes))
        self.rho += np.histogram(mass, np.array(RHO_EDGES, np.float32))[0]

    def merge(self, other: Stats) -> None:
        for name in ("samples", "positions", "ids", "capped", "gold_appended"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.sizes = _sum(self.sizes, other.sizes)
        self.rho += other.rho

    def counts(self) -> dict[str, int]:
        return {"samples": self.samples, "positions": self.positions, "ids": self.ids}

    def summary(self) -> dict[str, Any]:
        """Histograms and fractions as the manifest has them; fractions are of positions."""
        share = (lambda n: n / self.positions) if self.positions else (lambda n: 0.0)
        return {
            "set_size": {"edges": list(SIZE_EDGES), "counts": self._binned()},
            "set_size_mean": share(self.ids),
            "set_size_median": self._median(),
            "set_size_max": int(np.flatnonzero(self.sizes).max(initial=0)),
            "rho": {"edges": list(RHO_EDGES), "counts": self.rho.tolist()},
            "capped_share": share(self.capped),
            "gold_appended_share": share(self.gold_appended),
            "size_one_share": share(int(self.sizes[1])),
        }

    def _binned(self) -> list[int]:
        found = np.flatnonzero(self.sizes)
        bins = np.searchsorted(SIZE_EDGES, found, side="right") - 1
        return [int(self.sizes[found[bins == i]].sum()) for i in range(len(SIZE_EDGES) - 1)]

    def _median(self) -> int:
        """The lower median."""
        return int(np.searchsorted(self.sizes.cumsum(), (self.positions + 1) // 2)) if self.positions else 0


def _sum(a: Array, b: Array) -> Array:
    """Two arrays of counts, the shorter one as if it went on with zeros."""
    total, less = (a.copy(), b) if len(a) >= len(b) else (b.copy(), a)
    total[: len(less)] += less
    return total


def gold_appended(sets: SampleSets, rule: CandidateRule) -> Array:
    """[P] bool: true where the gold token was added to a set that did not have it.

    A set of more than k_max + `always` ids shows it by its size. With logits a smaller one shows it too: gold is its
    least likely token, and the others reach tau without it. They must be at least min_set_size (arXiv 2510.09152,
    section 2). Without logits a smaller set cannot show it, and counts as false. A full set that had some ids of
    `always` anyway counts as false.
    """
    sizes = sets.sizes()
    full = sizes > rule.k_max + len(rule.always)
    if sets.logits is None or not len(sets.ids):
        return full
    mass = np.exp(np.minimum(sets.logits.astype(np.float64) - np.repeat(sets.lse.astype(np.float64), sizes), 0))
    starts = sets.offsets[:-1]
    gold = mass[starts + sets.gold_slot]
    last = gold <= np.minimum.reduceat(mass, starts)
    reached = np.add.reduceat(mass, starts) - gold >= rule.tau
    appended: Array = full | (last & (sizes > rule.min_set_size) & reached)
    return appended
