"""Benchmarks answered by generation: GSM8K, MATH and BIG-Bench Hard, by the conventions of lm-evaluation-harness.

| task | keys | the answer is | stops at |
|---|---|---|---|
| gsm8k | question, answer | strict: the number after `####`; flexible: the last number | Question: |
| math | problem, solution | what the last `\\boxed` holds, else what follows "final answer is" | Problem: |
| bbh | input, target | what follows "the answer is" on its line, else the first line | Q: |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_replay.errors import DataError
from megatron_replay.scoring.latex import boxed, normalised
from megatron_replay.scoring.question_files import Item, read_items
from megatron_replay.scoring.shots import Asked, context

Extract = Callable[[str], str | None]
"""An answer's text to what is compared, None where nothing is found."""

STRICT = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
FINAL = re.compile(r"[Ff]inal answer is:?\s*(.*?)\.?\s*(?:I hope it is correct|$)", re.DOTALL)
SAID = re.compile(r".*the answer is:?[ \t]*(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Task:
    name: str
    keys: tuple[str, str]
    """The keys of the question and of the answer as it stands in examples."""
    prompt: str
    """The question in plain style, with {} for its text."""
    stop: str
    """Where the next question would begin: the answer ends before it."""
    extract: Mapping[str, Extract]
    """{verdict: how the answer is found}; the last one also finds the gold answer."""


@dataclass(frozen=True)
class Problem:
    task: Task
    text: str
    solution: str
    """The answer as examples show it."""
    gold: str
    subject: str = ""


def gsm8k_strict(text: str) -> str | None:
    """The first number after `####`, as the training set writes it."""
    found = STRICT.search(text)
    return number(found[1]) if found else None


def gsm8k_flexible(text: str) -> str | None:
    """The last number of the text."""
    found = NUMBER.findall(text)
    return number(found[-1]) if found else None


def number(text: str) -> str:
    """A number without commas, dollar signs and a full stop at its end: "$1,234." is "1234"."""
    return text.replace(",", "").replace("$", "").removesuffix(".")


def math_answer(text: str) -> str | None:
    r"""What the last \boxed holds, else what follows "final answer is" (Minerva's convention), normalised."""
    found = boxed(text)
    if found is None:
        said = FINAL.search(text)
        found = said[1].strip().strip("$") if said else None
    return None if found is None else normalised(found)


def bbh_answer(text: str) -> str | None:
    """What follows the last "the answer is" on its line, else the first line, without a full stop at its end."""
    said = SAID.findall(text)
    lines = text.strip().splitlines()
    answer = said[-1] if said else lines[0] if lines else ""
    return answer.strip().removesuffix(".").strip() or None


TASKS = (
    Task(
        "gsm8k",
        ("question", "answer"),
        "Question: {}\nAnswer:",
        "Question:",
        {"strict": gsm8k_strict, "flexible": gsm8k_flexible},
    ),
    Task("math", ("problem", "solution"), "Problem:\n{}\n\nSolution:", "Problem:", {"exact": math_answer}),
    Task("bbh", ("input", "target"), "Q: {}\nA:", "Q:", {"exact": bbh_answer}),
)


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file or folder; the task is the one whose keys each has.

    Raises DataError, naming file and line, for a problem of no known task or with a solution that holds no answer.
    """
    return [_problem(item) for item in read_items(path)]


def _problem(item: Item) -> Problem:
    for task in TASKS:
        text, solution = (item.keys.get(key) for key in task.keys)
        if isinstance(text, str) and isinstance(solution, str):
            break
    else:
        raise DataError(
            f"{item.where}: a question to generate for has the keys "
            f"{'; or '.join(f'{task.keys[0]} and {task.keys[1]} ({task.name})' for task in TASKS)}"
        )
    if task.name == "gsm8k" and gsm8k_strict(solution) is None:
        raise DataError(f"{item.where}: the answer has no '#### number' at its end; GSM8K's answers have")
    gold = [*task.extract.values()][-1](solution)
    if gold is None:
        raise DataError(f"{item.where}: no final answer found in {solution[-60:]!r}; give it in \\boxed{{}}")
    subject = item.subject if task.name == "bbh" else ""
    return Problem(task, text.strip(), solution.strip(), gold, subject)


def problem_context(asked: Asked[Problem]) -> str:
    """The text before the answer: examples with their solutions, then the problem."""
    return context(asked, lambda one: one.task.prompt.format(one.text), lambda one: one.solution)


def finished(text: str, *stops: str) -> str:
    """The answer, cut where the first of the stop texts begins."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def verdicts(problem: Problem, answer: str) -> dict[str, bool]:
    """{verdict: whether the answer found that way is the gold one}."""
    return {name: find(answer) == problem.gold for name, find in problem.task.extract.items()}


def one_task(problems: Sequence[Problem], path: Path) -> None:
    """Raise DataError unless all problems of a file are of one task."""
    names = sorted({problem.task.name for problem in problems})
    if len(names) > 1:
        raise DataError(f"{path}: questions of {' and '.join(names)}; give each benchmark a file and a name of its own")
