"""The score of a predicted query: execution match (same result as the gold query) or exact match (same words)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_replay.scoring.sandbox import Cell, Outcome, Row, Sandbox, execute
from megatron_replay.scoring.sqltext import exact_match, extract_sql, has_order_by, normalise

__all__ = [
    "Match",
    "Outcome",
    "Sandbox",
    "exact_match",
    "execute",
    "execution_match",
    "extract_sql",
    "has_order_by",
    "normalise",
    "same_result",
]

# Tolerances: sums of floats depend on the order of their terms. The absolute one is for sums that cancel to 0.
RELATIVE, ABSOLUTE = 1e-6, 1e-9


@dataclass(frozen=True)
class Match:
    """The verdict: right or not, and the reason in a line.

    A reason that begins with "gold" counts against the data, not the model.
    """

    correct: bool
    reason: str


def execution_match(
    database: str | Path,
    predicted: str,
    gold: str,
    *,
    sandbox: Sandbox | None = None,
    seconds: float = 5.0,
    max_rows: int = 10_000,
) -> Match:
    """Run both queries and compare their rows.

    The order counts when the gold query has a top-level ORDER BY; otherwise the rows are a multiset. Give a `Sandbox`
    when scoring many. Raises DataError when the file is missing or not a database.
    """
    if sandbox is None:
        with Sandbox() as own:
            return execution_match(database, predicted, gold, sandbox=own, seconds=seconds, max_rows=max_rows)
    truth = sandbox.execute(database, gold, seconds=seconds, max_rows=max_rows)
    if truth.error is not None:
        return Match(False, f"gold query failed: {truth.error}")
    answer = sandbox.execute(database, predicted, seconds=seconds, max_rows=max_rows)
    if answer.error is not None:
        return Match(False, f"query failed: {answer.error}")
    ordered = has_order_by(gold)
    if same_result(answer.rows, truth.rows, ordered):
        return Match(True, "same result")
    if len(answer.rows) != len(truth.rows):
        return Match(False, f"{len(answer.rows)} rows, gold has {len(truth.rows)}")
    return Match(
        False, "other order of rows" if ordered and same_result(answer.rows, truth.rows, False) else "other values"
    )


def same_result(predicted: Sequence[Row], gold: Sequence[Row], ordered: bool) -> bool:
    """True where two results have the same rows, as often; with `ordered`, also in the same order.

    This is the strict form. The order of columns counts, their names do not. 1 equals 1.0, '1' is not 1, and NULL
    equals NULL. Two numbers of which one is a float are equal within 1e-6 of the larger. Two integers, and two texts,
    must agree exactly. Two empty results are equal.
    """
    if len(predicted) != len(gold):
        return False
    if ordered:
        return all(map(_same_row, predicted, gold))
    missing, extra = Counter(gold), Counter(predicted)
    # 1 and 1.0 hash alike: what remains differs at least in the last bits of a float
    missing, extra = missing - extra, extra - missing
    return _same_but_for_rounding(list(extra.elements()), list(missing.elements()))


def _same_but_for_rounding(predicted: list[Row], gold: list[Row]) -> bool:
    """Pair each predicted row with a gold row of its own. Candidates agree in everything that is not a number."""
    groups: dict[tuple[Cell, ...], list[Row]] = defaultdict(list)
    for row in sorted(gold, key=_numbers):
        groups[_words(row)].append(row)
    for row in sorted(predicted, key=_numbers):
        left = groups[_words(row)]
        partner = next((i for i, other in enumerate(left) if _same_row(row, other)), None)
        if partner is None:
            return False
        del left[partner]
    return True


def _numbers(row: Row) -> tuple[float, ...]:
    return tuple(cell for cell in row if isinstance(cell, (int, float)))


def _words(row: Row) -> tuple[Cell, ...]:
    return tuple(0 if isinstance(cell, (int, float)) else cell for cell in row)


def _same_row(left: Row, right: Row) -> bool:
    return len(left) == len(right) and all(map(_same_cell, left, right))


def _same_cell(left: Cell, right: Cell) -> bool:
    if isinstance(left, (int, float)) and isinstance(right, (int, float)) and float in (type(left), type(right)):
        return math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return type(left) is type(right) and left == right
