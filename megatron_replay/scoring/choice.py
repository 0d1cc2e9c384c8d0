"""Multiple choice by likelihood: the answer is the least surprising choice, and the accuracy has an interval.

Prompts are those of lm-evaluation-harness. `letters` is its `mmlu`: the choices stand in the prompt, and their letters
are scored. `text` is its `mmlu_continuation` and `arc`: the choices themselves are scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_replay.errors import DataError
from megatron_replay.scoring.choice_layouts import LETTERS, Question
from megatron_replay.scoring.shots import Asked, context

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution


class Proportion(NamedTuple):
    """A fraction and its 95 % interval."""

    value: float
    low: float
    high: float


def proportion(k: int, n: int) -> Proportion:
    """k of n with the Wilson score interval (Wilson 1927).

    The interval stays inside [0, 1] and is not empty at 0 or n. Raises DataError when n is 0 or k does not lie in 0..n.
    """
    if n < 1 or not 0 <= k <= n:
        raise DataError(f"a proportion needs 0 <= k <= n with n at least 1, got k={k}, n={n}; is the data set empty?")
    fraction, shrink = k / n, 1 + Z95**2 / n
    centre = (fraction + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(fraction * (1 - fraction) / n + Z95**2 / (4 * n * n))
    low = 0.0 if k == 0 else centre - half
    high = 1.0 if k == n else centre + half
    return Proportion(fraction, low, high)


def choice_context(asked: Asked[Question], answers: str) -> str:
    """The text before the choice: a line about the subject, where there is one, the examples, and the question.

    answers: letters or text.
    """
    subject = asked.question.subject
    kind = "multiple choice questions" if answers == "letters" else "questions"
    head = f"The following are {kind} (with answers) about {subject}.\n\n" if subject else ""
    return head + context(asked, lambda one: _ask(one, answers), lambda one: scored(one, answers)[one.answer])


def _ask(question: Question, answers: str) -> str:
    if answers == "text":
        return f"Question: {question.text}\nAnswer:"
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([question.text, *lines, "Answer:"])


def scored(question: Question, answers: str) -> list[str]:
    """The texts whose likelihoods are compared, without the delimiter before them."""
    return list(LETTERS[: len(question.choices)]) if answers == "letters" else list(question.choices)


def choose(nlls: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """Index of the choice with the lowest NLL; the first of equals.

    NLL is in nats, summed over the choice's tokens. With `lengths` (bytes of each choice) the NLL per unit of
    length decides, so a long answer loses nothing by its length. A NaN is never chosen. Raises DataError when
    there is nothing to choose from.
    """
    if lengths is not None and len(lengths) != len(nlls):
        raise DataError(f"{len(nlls)} choices but {len(lengths)} lengths; give one length for each choice")
    if lengths is not None and min(lengths, default=1) < 1:
        raise DataError(f"a choice of length {min(lengths)} has no likelihood per length; drop the empty choice")
    scores = [nll / length for nll, length in zip(nlls, lengths or [1] * len(nlls), strict=True)]
    usable = [i for i, score in enumerate(scores) if not math.isnan(score)]
    if not usable:
        raise DataError(f"none of {len(nlls)} choices has a finite likelihood")
    return min(usable, key=scores.__getitem__)


def score_choices(
    nlls: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], answers: Sequence[int]
) -> dict[str, float | int | Proportion]:
    """Accuracy by summed NLL (lm-eval's acc) and by NLL per byte (its acc_bytes), and the mean NLL of the right answer.

    Lengths are bytes of UTF-8; where they are characters too, the latter is lm-eval's acc_norm. There are Q questions
    of C choices: nlls and lengths [Q][C], answers [Q]. Raises DataError where they do not match.
    """
    if not len(nlls) == len(lengths) == len(answers):
        raise DataError(
            f"{len(nlls)} questions, {len(lengths)} rows of lengths and {len(answers)} answers; they must be as many"
        )
    for number, (row, answer) in enumerate(zip(nlls, answers, strict=True), start=1):
        if not 0 <= answer < len(row):
            raise DataError(f"question {number}: answer {answer} is not one of its {len(row)} choices (counted from 0)")
    plain = sum(choose(row) == answer for row, answer in zip(nlls, answers, strict=True))
    normed = sum(choose(row, size) == answer for row, size, answer in zip(nlls, lengths, answers, strict=True))
    return {
        "questions": len(answers),
        "accuracy": proportion(plain, len(answers)),
        "accuracy_normalised": proportion(normed, len(answers)),
        "answer_nll": sum(row[answer] for row, answer in zip(nlls, answers, strict=True)) / len(answers),
    }
