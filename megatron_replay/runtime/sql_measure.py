"""The measure `nl2sql`: greedy SQL for every question, run beside the gold query and judged by a published rule."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_replay.config import Evaluate
from megatron_replay.errors import DataError, ReplayError
from megatron_replay.parallel.generation import generate
from megatron_replay.parallel.inference import in_groups
from megatron_replay.runtime.progress import Advance
from megatron_replay.runtime.session import Session
from megatron_replay.runtime.sql_questions import SqlQuestion, read_sql_questions
from megatron_replay.scoring import (
    LEVELS,
    Sandbox,
    exact_match,
    execution_match,
    extract_sql,
    find_rule,
    gold_fault,
    proportion,
)

RIGHT, WRONG, LEFT_OUT = "right", "wrong", "left out"
"""Verdicts; what is left out is not in the denominator."""
TOLD = 10
"""Gold queries that fail and are printed; the result holds them all."""
TURNS = 16
"""Questions that a rank runs between two meetings of the ranks."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Scored:
    """A question with its answer and verdict. Answer and predicted are empty where the gold query failed."""

    question: SqlQuestion
    verdict: str
    reason: str
    seconds: float
    """Time of running the predicted query on all its databases, beside the gold query."""
    answer: str = ""
    predicted: str = ""

    @property
    def exact(self) -> bool:
        return bool(self.predicted) and exact_match(self.predicted, self.question.gold)


def nl2sql(session: Session) -> dict[str, Any]:
    """The fractions of questions with the gold query's result, and with the gold query itself; both by hardness.

    The gold queries run first. Those that fail, or pass `sql_rows` or `sql_seconds`, are told before anything is
    generated. No answer is generated for them: they are left out, or wrong answers where the rule has it so (bird).
    Raises DataError where no gold query runs.
    """
    asked = session.config.evaluate
    questions = read_sql_questions(asked)  # all of it is checked before the hours of generating
    faults = _gold_faults(session, questions)
    todo = [question for question, fault in zip(questions, faults, strict=True) if fault is None]
    answers = _answers(session, todo)
    pairs = list(zip(todo, answers, strict=True))
    with session.progress("execution", len(pairs), "questions") as advance:
        scored = iter(_dealt(session, pairs, lambda box, pair: _score(box, asked, *pair), advance))
    results = [
        next(scored) if fault is None else _at_fault(asked, question, f"gold query failed: {fault}")
        for question, fault in zip(questions, faults, strict=True)
    ]
    return {**summary(results, asked.sql_rule), "rows": [_row(one, asked.sql_rule) for one in results]}


def summary(results: Sequence[Scored], rule: str) -> dict[str, Any]:
    """The numbers of an evaluation: what is left out counts in `questions` and `gold_failed` only."""
    counted = [one for one in results if one.verdict != LEFT_OUT]
    failed = [one for one in results if one.reason.startswith("gold query failed")]
    levels = dict.fromkeys(one.question.level for one in counted)
    order = [*(level for level in LEVELS if level in levels), *(level for level in levels if level not in LEVELS)]
    return {
        "rule": rule,
        "execution": _share_right(counted),
        "exact": proportion(sum(one.exact for one in counted), len(counted)),
        "questions": len(results),
        "scored": len(counted),
        "gold_failed": len(failed),
        "hardness": {level: _level([one for one in counted if one.question.level == level]) for level in order},
        "gold_failures": [
            {"where": one.question.where, "db_id": one.question.db_id, "gold": one.question.gold, "reason": one.reason}
            for one in failed
        ],
        "examples": [
            {"gold": one.question.gold, "predicted": one.predicted, "correct": one.verdict == RIGHT}
            for one in counted[:5]
        ],
    }


def _level(counted: Sequence[Scored]) -> dict[str, Any]:
    return {"execution": _share_right(counted), "questions": len(counted)}


def _share_right(counted: Sequence[Scored]) -> Any:
    return proportion(sum(one.verdict == RIGHT for one in counted), len(counted))


def _row(one: Scored, rule: str) -> dict[str, Any]:
    """The question as `runtime.questions` keeps it; one that is left out has no `correct`."""
    question = one.question
    correct = {} if one.verdict == LEFT_OUT else {"correct": one.verdict == RIGHT}
    return {
        "question": question.uid,
        **correct,
        "db_id": question.db_id,
        "hardness": question.level,
        "prompt": question.asked,
        "answer": one.answer,
        "predicted": one.predicted,
        "gold": question.gold,
        "rule": rule,
        "verdict": one.verdict,
        "reason": one.reason,
        "exact": one.exact,
        "seconds": round(one.seconds, 4),
    }


def _gold_faults(session: Session, questions: Sequence[SqlQuestion]) -> list[str | None]:
    """Why the gold query of each question fails, or None; they are told."""
    asked = session.config.evaluate

    def fault(sandbox: Sandbox, question: SqlQuestion) -> str | None:
        return gold_fault(
            question.databases,
            question.gold,
            rule=asked.sql_rule,
            sandbox=sandbox,
            seconds=asked.sql_seconds,
            max_rows=asked.sql_rows,
        )

    faults = _dealt(session, questions, fault)
    failed = [f"  {q.where}: {fault}" for q, fault in zip(questions, faults, strict=True) if fault is not None]
    if len(failed) == len(questions):
        raise DataError(
            f"{asked.nl2sql}: no gold query runs within evaluate.sql_seconds={asked.sql_seconds:g} and "
            f"evaluate.sql_rows={asked.sql_rows}; the first fails with: {faults[0]}"
        )
    if failed:
        how = "count as wrong" if find_rule(asked.sql_rule).scores_failed_gold else "are left out"
        session.say(
            f"nl2sql: {len(failed)} of {len(questions)} gold queries fail, and their questions {how} "
            f"(sql_rule={asked.sql_rule}; limits: sql_seconds={asked.sql_seconds:g}, sql_rows={asked.sql_rows})"
        )
        session.say("\n".join([*failed[:TOLD], *(["  ..."] if len(failed) > TOLD else [])]))
    return faults


def _answers(session: Session, questions: Sequence[SqlQuestion]) -> list[str]:
    asked = session.config.evaluate
    prompts = [session.template.prompt(question.prompt) for question in questions]
    with session.progress("nl2sql", len(prompts), "questions") as advance:
        answers = generate(
            session.model,
            prompts,
            max_new_tokens=asked.max_new_tokens,
            stop_ids=session.stop_ids,
            vocab_size=session.vocab_size,
            batch=asked.batch,
            progress=advance,
        )
    return [session.tokenizer.decode(answer) for answer in answers]


def _at_fault(asked: Evaluate, question: SqlQuestion, reason: str) -> Scored:
    """The verdict on a question whose gold query fails."""
    return Scored(question, WRONG if find_rule(asked.sql_rule).scores_failed_gold else LEFT_OUT, reason, 0.0)


def _score(sandbox: Sandbox, asked: Evaluate, question: SqlQuestion, answer: str) -> Scored:
    predicted = extract_sql(answer)
    began = time.perf_counter()
    match = execution_match(
        question.databases,
        predicted,
        question.gold,
        rule=asked.sql_rule,
        sandbox=sandbox,
        seconds=asked.sql_seconds,
        max_rows=asked.sql_rows,
    )
    seconds = time.perf_counter() - began
    if match.gold_failed:  # only now, near its time limit
        return _at_fault(asked, question, match.reason)
    return Scored(question, RIGHT if match.correct else WRONG, match.reason, seconds, answer, predicted)


def _dealt(
    session: Session, items: Sequence[T], work: Callable[[Sandbox, T], R], advance: Advance = lambda _: None
) -> list[R]:
    """work(sandbox, item) of every item, in order, known to all ranks; each rank works on every `size`-th.

    The ranks meet after each `TURNS` items, so that none waits longer than a process group allows. An error of one is
    raised on all.
    """
    world = session.world
    found: list[R] = []
    with Sandbox() as sandbox:
        for chunk in in_groups(items, TURNS * world.size):
            parts = world.gather_objects(_worked(sandbox, chunk[world.rank :: world.size], work))
            for part in parts:
                if isinstance(part, ReplayError):
                    raise part
            found.extend(parts[i % world.size][i // world.size] for i in range(len(chunk)))
            advance(len(chunk))
    return found


def _worked(sandbox: Sandbox, items: Sequence[T], work: Callable[[Sandbox, T], R]) -> list[R] | ReplayError:
    try:
        return [work(sandbox, item) for item in items]
    except ReplayError as err:
        return err
