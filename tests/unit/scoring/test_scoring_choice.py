"""Multiple choice and proportions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import DataError
from megatron_replay.scoring import choose, proportion, score_choices

NAN = math.nan


@pytest.mark.parametrize(
    ("nlls", "lengths", "index"),
    [
        ([3.0, 1.0, 2.0], None, 1),
        ([2.0, 2.0], None, 0),
        ([4.0, 5.0], [1, 5], 1),
        ([NAN, 9.0], None, 1),
        ([math.inf, 9.0], None, 1),
        ([0.0], [3], 0),
    ],
)
def test_choose(nlls: list[float], lengths: list[int] | None, index: int) -> None:
    assert choose(nlls, lengths) == index


@pytest.mark.parametrize(("nlls", "lengths"), [([], None), ([NAN, NAN], None), ([1.0], [0]), ([1.0, 2.0], [1])])
def test_nothing_to_choose_from(nlls: list[float], lengths: list[int] | None) -> None:
    with pytest.raises(DataError):
        choose(nlls, lengths)


def test_score_choices() -> None:
    scores = score_choices([[4.0, 5.0], [1.0, 3.0], [2.0, 1.0]], [[1, 5], [1, 2], [1, 1]], [1, 0, 1])
    assert scores["questions"] == 3
    assert scores["accuracy"].value == pytest.approx(2 / 3)
    assert scores["accuracy_normalised"].value == 1
    assert scores["answer_nll"] == pytest.approx((5 + 1 + 1) / 3)


def test_score_choices_names_the_question_whose_answer_is_no_choice() -> None:
    with pytest.raises(DataError, match="question 2: answer 4"):
        score_choices([[1.0, 2.0], [1.0, 2.0]], [[1, 1], [1, 1]], [0, 4])
    with pytest.raises(DataError, match="as many"):
        score_choices([[1.0]], [[1]], [])


def test_wilson_interval_of_known_cases() -> None:
    # R: prop.test(k, n, correct = FALSE)
    assert proportion(5, 10) == pytest.approx((0.5, 0.2365931, 0.7634069), abs=1e-6)
    assert proportion(0, 10) == pytest.approx((0.0, 0.0, 0.2775328), abs=1e-6)
    assert proportion(81, 263) == pytest.approx((0.3079848, 0.2552774, 0.3662061), abs=2e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(deadline=None, max_examples=50)
def test_interval_lies_in_0_1_holds_the_share_and_mirrors(pair: tuple[int, int]) -> None:
    k, n = pair
    share, low, high = proportion(k, n)
    assert 0 <= low <= share <= high <= 1 and low < high
    assert proportion(n - k, n) == pytest.approx((1 - share, 1 - high, 1 - low))


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_no_proportion_of_nothing(k: int, n: int) -> None:
    with pytest.raises(DataError, match=f"k={k}, n={n}"):
        proportion(k, n)
