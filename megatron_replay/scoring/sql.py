"""The verdict on a predicted query: execution match (same result as the gold query) by one of the `sql_rules`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_replay.scoring.sandbox import Outcome, Sandbox, execute
from megatron_replay.scoring.sql_answer import extract_sql
from megatron_replay.scoring.sql_rules import Rule, find_rule, same_result
from megatron_replay.scoring.sqltext import exact_match, has_order_by, normalise

__all__ = [
    "Match",
    "Outcome",
    "Sandbox",
    "exact_match",
    "execute",
    "execution_match",
    "extract_sql",
    "gold_fault",
    "has_order_by",
    "normalise",
    "same_result",
]


@dataclass(frozen=True)
class Match:
    """The verdict: right or not, and the reason in a line.

    A reason that begins with "gold" counts against the data, not the model.
    """

    correct: bool
    reason: str

    @property
    def gold_failed(self) -> bool:
        return self.reason.startswith("gold")


def execution_match(
    database: str | Path | Sequence[str | Path],
    predicted: str,
    gold: str,
    *,
    rule: str = "strict",
    sandbox: Sandbox | None = None,
    seconds: float = 5.0,
    max_rows: int = 10_000,
) -> Match:
    """Run both queries and compare their rows by the rule: spider, bird or strict.

    With several databases (a test suite) the query is right where it is right on each of them. Give a `Sandbox` when
    scoring many. Raises DataError when a file is missing or not a database, ConfigError for an unknown rule.
    """
    if sandbox is None:
        with Sandbox() as own:
            return execution_match(
                database, predicted, gold, rule=rule, sandbox=own, seconds=seconds, max_rows=max_rows
            )
    chosen = find_rule(rule)
    suite = [database] if isinstance(database, (str, Path)) else list(database)
    match = Match(False, "no database")
    for path in suite:
        truth = sandbox.execute(path, chosen.prepare(gold), seconds=seconds, max_rows=max_rows)
        if truth.error is not None:
            return Match(False, f"gold query failed: {truth.error}")
        answer = sandbox.execute(path, chosen.prepare(predicted), seconds=seconds, max_rows=max_rows)
        match = _compared(answer, truth, chosen, ordered=chosen.ordered(gold))
        if not match.correct:
            where = f"{Path(path).stem}: " if len(suite) > 1 else ""
            return Match(False, where + match.reason)
    return match


def gold_fault(
    databases: Sequence[str | Path],
    gold: str,
    *,
    rule: str,
    sandbox: Sandbox,
    seconds: float,
    max_rows: int,
) -> str | None:
    """The reason why no prediction can be right, or None: the gold query fails or passes a limit on a database."""
    query = find_rule(rule).prepare(gold)
    for path in databases:
        error = sandbox.execute(path, query, seconds=seconds, max_rows=max_rows).error
        if error is not None:
            return f"{Path(path).stem}: {error}" if len(databases) > 1 else error
    return None


def _compared(answer: Outcome, truth: Outcome, rule: Rule, *, ordered: bool) -> Match:
    if answer.error is not None:
        return Match(False, f"query failed: {answer.error}")
    if rule.same(answer.rows, truth.rows, ordered):
        return Match(True, "same result")
    if rule.counts_rows and len(answer.rows) != len(truth.rows):
        return Match(False, f"{len(answer.rows)} rows, gold has {len(truth.rows)}")
    if ordered and rule.same(answer.rows, truth.rows, False):
        return Match(False, "other order of rows")
    return Match(False, "other values")
