"""Gain against forgetting: fronts and interpolation on points whose answers are seen at once."""

from __future__ import annotations

import math

import pytest

from megatron_replay.scoring.fronts import at_gain, front, matched


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [(2.0, 0.5), (1.0, 1.0), (1.5, 0.4), (1.5, 0.9), (3.0, 0.1), (1.0, 1.2)]
    assert front(points) == [1, 2, 4]
    assert front([]) == []


def test_forgetting_is_interpolated_between_neighbouring_rates() -> None:
    points = [(3.0, 0.0), (2.0, 1.0), (1.0, 3.0)]
    assert at_gain(points, 2.5) == pytest.approx(0.5)
    assert at_gain(points, 1.25) == pytest.approx(2.5)
    assert at_gain(points, 2.0) == 1.0
    assert at_gain(points, 0.9) is None and at_gain([], 1.0) is None


def test_a_recipe_that_comes_back_counts_with_its_best_rate() -> None:
    """Too high a rate loses on the domain again: the loss is passed twice, and the lower forgetting counts."""
    assert at_gain([(3.0, 0.0), (1.0, 1.0), (2.0, 5.0)], 2.0) == pytest.approx(0.5)


def test_the_interval_is_students_over_seeds() -> None:
    found = matched({1: [(2.0, 1.0)], 2: [(2.0, 2.0)], 3: [(2.0, 3.0)], 4: [(1.0, 9.0)]}, 2.0)
    assert found is not None
    assert (found.seeds, found.mean) == (3, 2.0)
    assert found.half == pytest.approx(4.303 * 1.0 / math.sqrt(3), rel=1e-3)
    alone = matched({1: [(2.0, 1.0)]}, 2.0)
    assert alone is not None and alone.mean == 1.0 and math.isnan(alone.half)
    assert matched({1: [(2.0, 1.0)]}, 3.0) is None
