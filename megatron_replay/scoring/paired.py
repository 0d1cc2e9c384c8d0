"""Paired comparisons: two runs answered the same questions, and the difference has an interval and a p value.

Questions differ in difficulty far more than runs do. Pairing removes that, so a difference shows that two separate
intervals would hide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_replay.errors import DataError

RESAMPLES = 10_000
BLOCK = 1 << 22
"""Random numbers drawn at a time: 32 MiB."""

Floats = NDArray[np.float64]


class Difference(NamedTuple):
    """The value of each run, second - first with its 95 % interval, and the p value of no difference."""

    questions: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p: float


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact McNemar test (McNemar 1947): two-sided p from the questions that only one of two runs has right.

    Without a difference, a discordant question is right in either run with probability 1/2. So p is twice the smaller
    tail of Binomial(only_first + only_second, 1/2), at most 1. Raises DataError for a negative count.
    """
    fewer, n = min(only_first, only_second), only_first + only_second
    if fewer < 0:
        raise DataError(f"counts of questions are not negative, got {only_first} and {only_second}")
    tail = sum(comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))


def compare_correct(first: Sequence[bool], second: Sequence[bool], *, seed: int = 0) -> Difference:
    """Accuracies of two runs on the same questions [Q]: bootstrap interval, p of the exact McNemar test.

    Raises DataError when the runs have unlike numbers of questions, or none.
    """
    found = compare_ratio(np.asarray(first, float), np.asarray(second, float), seed=seed)
    only = [sum(a and not b for a, b in zip(x, y, strict=True)) for x, y in ((first, second), (second, first))]
    return found._replace(p=mcnemar(*only))


def compare_ratio(
    first: ArrayLike, second: ArrayLike, weights: ArrayLike | None = None, *, seed: int = 0, resamples: int = RESAMPLES
) -> Difference:
    """sum(values) / sum(weights) of two runs over the same questions, by the paired bootstrap (Efron 1979).

    - first, second [Q]: a value a question, such as its NLL summed over tokens.
    - weights [Q]: its tokens; without them, the mean over questions.

    Questions are drawn with replacement, the same ones for both runs. The interval is that of the percentiles. p is
    twice the smaller share of resamples on one side of 0, both counted with one more (Davison & Hinkley 1997, 4.11).
    Raises DataError when the lengths differ, there is no question, a value is not finite, or a weight not above 0.
    """
    values, divisor = _checked((first, second), weights)
    observed = values.sum(1) / divisor.sum()
    drawn = np.concatenate([_ratios(values, divisor, picked) for picked in _draws(len(divisor), seed, resamples)])
    differences = drawn[:, 1] - drawn[:, 0]
    low, high = (float(edge) for edge in np.quantile(differences, (0.025, 0.975)))
    tail = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (resamples + 1))
    one, two = (float(value) for value in observed)
    return Difference(len(divisor), one, two, two - one, low, high, p)


def ratio_interval(
    values: ArrayLike, weights: ArrayLike, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """The 95 % bootstrap interval of sum(values) / sum(weights), drawn over the questions [Q].

    Raises DataError as `compare_ratio` does.
    """
    rows, divisor = _checked((values,), weights)
    drawn = np.concatenate([_ratios(rows, divisor, picked) for picked in _draws(len(divisor), seed, resamples)])
    low, high = np.quantile(drawn[:, 0], (0.025, 0.975))
    return float(low), float(high)


def _checked(runs: Sequence[ArrayLike], weights: ArrayLike | None) -> tuple[Floats, Floats]:
    """Values [runs, Q] and weights [Q]."""
    arrays = [np.asarray(run, dtype=np.float64) for run in runs]
    divisor = np.ones(len(arrays[0])) if weights is None else np.asarray(weights, dtype=np.float64)
    sizes = {len(array) for array in (*arrays, divisor)}
    if len(sizes) > 1 or 0 in sizes:
        raise DataError(f"a paired comparison needs the same questions in both runs, at least one; got {sorted(sizes)}")
    values = np.stack(arrays)
    if not np.isfinite(values).all() or not (divisor > 0).all():
        raise DataError("a paired comparison needs finite values and weights above 0; leave out the broken questions")
    return values, divisor


def _draws(num_questions: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Indices [block, Q] of all resamples. PCG64's raw stream is fixed across versions of numpy."""
    source = np.random.PCG64(np.random.SeedSequence([seed, num_questions]))
    block = max(1, BLOCK // num_questions)
    for done in range(0, resamples, block):
        count = min(block, resamples - done)
        raw = source.random_raw(count * num_questions)
        yield (raw % np.uint64(num_questions)).astype(np.int64).reshape(count, num_questions)


def _ratios(values: Floats, weights: Floats, picked: NDArray[np.int64]) -> Floats:
    """Ratios [block, runs] of the resamples `picked` [block, Q]."""
    divisor = weights[picked].sum(1)
    return np.stack([run[picked].sum(1) / divisor for run in values], axis=1)
