"""Prompts of multiple choice, and the examples before a question."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_replay.errors import DataError
from megatron_replay.scoring.choice import choice_context, scored
from megatron_replay.scoring.choice_layouts import Question
from megatron_replay.scoring.shots import Asked, spread, with_examples

LAW = [Question(f"law {i}?", ("yes", "no", "né"), i % 2, "law") for i in range(3)]
ART = [Question(f"art {i}?", ("yes", "no"), 1, "art") for i in range(3)]


def subject(question: Question) -> str:
    return question.subject


def test_letters_are_the_prompt_of_mmlu() -> None:
    asked = Asked(LAW[2], LAW[:2])
    assert choice_context(asked, "letters") == (
        "The following are multiple choice questions (with answers) about law.\n\n"
        "law 0?\nA. yes\nB. no\nC. né\nAnswer: A\n\n"
        "law 1?\nA. yes\nB. no\nC. né\nAnswer: B\n\n"
        "law 2?\nA. yes\nB. no\nC. né\nAnswer:"
    )
    assert scored(LAW[2], "letters") == ["A", "B", "C"]


def test_text_is_the_prompt_of_mmlu_continuation() -> None:
    assert choice_context(Asked(LAW[2], LAW[:1]), "text") == (
        "The following are questions (with answers) about law.\n\n"
        "Question: law 0?\nAnswer: yes\n\nQuestion: law 2?\nAnswer:"
    )
    assert choice_context(Asked(Question("q?", ("a", "b"), 0), []), "text") == "Question: q?\nAnswer:"
    assert scored(LAW[2], "text") == ["yes", "no", "né"]


def test_examples_come_from_the_same_subject() -> None:
    found = with_examples([LAW[2], ART[2]], [*ART[:2], *LAW[:2]], 2, subject)
    assert [one.examples for one in found] == [LAW[:2], ART[:2]]
    assert [one.examples for one in with_examples(LAW, ART, 0, subject)] == [[], [], []]


def test_without_a_set_of_examples_the_first_questions_are_not_asked() -> None:
    found = with_examples([*LAW, *ART], None, 1, subject)
    assert [one.question for one in found] == [*LAW[1:], *ART[1:]]
    assert {one.examples[0] for one in found} == {LAW[0], ART[0]}


def test_too_few_examples_are_told() -> None:
    with pytest.raises(DataError, match=r"evaluate\.shots=2, but the subject 'art' has 0 examples"):
        with_examples([*LAW, *ART], LAW, 2, subject)
    with pytest.raises(DataError, match=r"all 3 questions serve as examples; lower evaluate\.shots"):
        with_examples(LAW, None, 3, subject)


@pytest.mark.parametrize(("size", "limit"), [(10, 3), (10, 10), (10, 20), (7, 1), (285, 57)])
def test_spread_takes_evenly(size: int, limit: int) -> None:
    picked = spread(range(size), limit)
    assert len(picked) == min(size, limit) and picked[0] == 0 and len(set(picked)) == len(picked)
    gaps = {b - a for a, b in pairwise(picked)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert spread(range(size), None) == list(range(size))
