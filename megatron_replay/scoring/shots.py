"""Questions and the examples before them (few-shot), by the conventions of lm-evaluation-harness.

An example is a question with its answer after one space. A blank line stands between any two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatron_replay.errors import DataError

T = TypeVar("T")

DELIMITER = " "
"""Between a question and its answer."""
SEPARATOR = "\n\n"
"""Between examples."""


@dataclass(frozen=True)
class Asked(Generic[T]):
    """A question and the examples that go before it."""

    question: T
    examples: list[T]


def with_examples(
    questions: Sequence[T], examples: Sequence[T] | None, num_shots: int, subject: Callable[[T], str]
) -> list[Asked[T]]:
    """Each question with the first `num_shots` examples of its subject.

    Without a set of examples, the first questions of each subject are the examples, and are not asked. Raises DataError
    where a subject has too few examples, and where no question is left to ask.
    """
    source = questions if examples is None else examples
    chosen: dict[str, list[T]] = {}
    spent: set[int] = set()
    for index, one in enumerate(source):
        own = chosen.setdefault(subject(one), [])
        if len(own) < num_shots:
            own.append(one)
            spent.add(index)
    asked = questions if examples is not None else [one for i, one in enumerate(questions) if i not in spent]
    if not asked:
        raise DataError(
            f"all {len(questions)} questions serve as examples; lower evaluate.shots, or name a file in "
            "evaluate.examples"
        )
    for name in dict.fromkeys(subject(one) for one in asked):
        if len(chosen.get(name, [])) < num_shots:
            raise DataError(
                f"evaluate.shots={num_shots}, but the subject {name!r} has {len(chosen.get(name, []))} examples; lower "
                "it, or name a file with more in evaluate.examples"
            )
    return [Asked(one, chosen.get(subject(one), [])) for one in asked]


def context(asked: Asked[T], ask: Callable[[T], str], answer: Callable[[T], str]) -> str:
    """The text before the answer: examples with their answers, then the question."""
    shown = [f"{ask(one)}{DELIMITER}{answer(one)}{SEPARATOR}" for one in asked.examples]
    return "".join(shown) + ask(asked.question)


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of the items, evenly spaced, so that every subject of a long file has its share."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]
