"""Paired tests against scipy where it is installed, and against its values written down."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import DataError
from megatron_replay.scoring.paired import compare_correct, compare_ratio, mcnemar, ratio_interval


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (0, 0, 1.0),
        (0, 1, 1.0),
        (0, 5, 0.0625),  # 2 / 2^5
        (0, 6, 0.03125),
        (1, 9, 22 / 1024),  # 2 (1 + 10) / 2^10
        (5, 5, 1.0),
        (12, 30, 0.007915897334896727),  # scipy.stats.binomtest(12, 42).pvalue
        (140, 190, 0.006899240385960827),  # scipy.stats.binomtest(140, 330).pvalue
        (0, 2000, 0.0),  # 2^-1999 is below the smallest double
    ],
)
def test_mcnemar_of_known_cases(only_first: int, only_second: int, p: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p, rel=1e-12, abs=1e-300)
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)


@given(st.integers(0, 400), st.integers(0, 400))
@settings(deadline=None, max_examples=100)
def test_mcnemar_is_the_binomial_test(only_first: int, only_second: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    if only_first + only_second:
        expected = stats.binomtest(only_first, only_first + only_second).pvalue
        assert mcnemar(only_first, only_second) == pytest.approx(expected, rel=1e-9)


def answers(num: int, right: float, seed: int) -> list[bool]:
    return [bool(hit) for hit in np.random.default_rng(seed).random(num) < right]


def test_accuracies_of_two_runs() -> None:
    first, second = [True, False, False, True], [True, True, True, False]
    found = compare_correct(first, second)
    assert (found.questions, found.first, found.second, found.difference) == (4, 0.5, 0.75, 0.25)
    assert found.p == 1.0 and found.low <= 0.25 <= found.high
    assert compare_correct(second, first).difference == -0.25


def test_the_same_answers_do_not_differ() -> None:
    first = answers(200, 0.3, 1)
    found = compare_correct(first, first)
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert compare_ratio(np.arange(5), np.arange(5)).p == 1


def test_the_interval_is_that_of_the_normal_approximation_where_it_holds() -> None:
    noise = np.random.default_rng(3).normal(size=(2, 2000))
    first, second = noise[0], noise[0] + 0.1 + 0.5 * noise[1]
    found = compare_ratio(first, second)
    error = (second - first).std(ddof=1) / math.sqrt(2000)
    assert found.low == pytest.approx(found.difference - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.difference + 1.96 * error, abs=0.1 * error)
    assert found.p == pytest.approx(2 / 10_001), "nine standard errors: no resample beyond 0"


def test_the_bootstrap_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    draw = np.random.default_rng(5)
    weights = draw.integers(1, 40, 300)
    first = weights * draw.normal(2, 0.5, 300)
    second = first + weights * draw.normal(0.03, 0.3, 300)

    def statistic(a: np.ndarray, b: np.ndarray, w: np.ndarray, axis: int) -> np.ndarray:
        return (b.sum(axis) - a.sum(axis)) / w.sum(axis)

    expected = stats.bootstrap(
        (first, second, weights), statistic, paired=True, method="percentile", n_resamples=20_000, rng=draw
    )
    found = compare_ratio(first, second, weights)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)


def test_weights_make_it_the_mean_of_a_token() -> None:
    found = compare_ratio([2.0, 30.0], [4.0, 30.0], [1, 10])
    assert found.first == pytest.approx(32 / 11) and found.difference == pytest.approx(2 / 11)


def test_p_is_that_of_the_rare_side() -> None:
    """Of the resamples of (-1, 2, 2), those with two or three -1 lie at or below 0: 7 of 27."""
    assert compare_ratio([0.0, 0.0, 0.0], [-1.0, 2.0, 2.0], resamples=50_000).p == pytest.approx(14 / 27, abs=0.015)


def test_a_seed_repeats_and_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = np.random.default_rng(7).normal(size=(2, 50))
    found = compare_ratio(first, second)
    assert compare_ratio(first, second) == found and compare_ratio(first, second, seed=1) != found
    monkeypatch.setattr("megatron_replay.scoring.paired.BLOCK", 170)
    assert compare_ratio(first, second) == found


def test_the_interval_of_one_run_covers_its_mean_as_often_as_it_says() -> None:
    draw = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        low, high = ratio_interval(draw.exponential(size=80), np.ones(80), resamples=500)
        covered += low <= 1 <= high
    assert 175 <= covered <= 199


def test_bad_input_is_refused() -> None:
    for first, second in (([], []), ([True], [True, False])):
        with pytest.raises(DataError, match="the same questions in both runs"):
            compare_correct(first, second)
    with pytest.raises(DataError, match="finite values"):
        compare_ratio([math.nan], [1.0])
    with pytest.raises(DataError, match="weights above 0"):
        compare_ratio([1.0], [1.0], [0])
    with pytest.raises(DataError, match="not negative, got -1 and 2"):
        mcnemar(-1, 2)
