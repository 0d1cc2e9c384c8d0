"""Gain against forgetting over several runs: the Pareto front, and what is forgotten at a gain that all reach.

Both numbers of a run are losses: the lower the gain's, the more is learnt; the lower the other, the less is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Point = tuple[float, float]
"""(loss on the domain, loss on what was known before)."""

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for 95 % two-sided, by degrees of freedom from 1 on."""


class Matched(NamedTuple):
    """Forgetting at a given loss on the domain: the mean over seeds and half of its 95 % interval."""

    seeds: int
    mean: float
    half: float
    """NaN where there is one seed."""


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other beats in both losses, from the lowest loss on the domain on."""
    best, kept = float("inf"), []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def at_gain(points: Sequence[Point], domain: float) -> float | None:
    """The least forgetting of a run of one recipe at this loss on the domain, by linear interpolation over its rates.

    None where no two rates, neighbours by rate, have the loss between them. points: in the order of their rates.
    """
    found = []
    for (a, fa), (b, fb) in pairwise(points):
        if min(a, b) <= domain <= max(a, b):
            share = 0.0 if a == b else (domain - a) / (b - a)
            found.append(fa + share * (fb - fa))
    found += [forgotten for loss, forgotten in points if loss == domain]
    return min(found, default=None)


def matched(by_seed: Mapping[int, Sequence[Point]], domain: float) -> Matched | None:
    """Forgetting at a loss on the domain over the seeds whose rates reach it; None where none does."""
    values = [value for points in by_seed.values() if (value := at_gain(points, domain)) is not None]
    if not values:
        return None
    half = float("nan")
    if len(values) > 1:
        half = T95[min(len(values) - 2, len(T95) - 1)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return Matched(len(values), float(np.mean(values)), half)
