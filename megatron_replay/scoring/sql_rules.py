"""When two results are the same: the rules of Spider, of BIRD, and a strict one.

- spider: the test-suite script of Zhong, Yu and Klein (EMNLP 2020; taoyds/test-suite-sql-eval, exec_eval.py), without
  `--keep_distinct` and `--plug_value`, as the leaderboard asks.
- bird: the script of Li et al. (NeurIPS 2023; bird/llm/src/evaluation.py): the sets of rows are equal.
- strict: columns in order, rows as often, and sums of floats may round.

docs/evaluate-sql.md compares them case by case.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_replay.errors import ConfigError
from megatron_replay.scoring.sandbox import Cell, Row
from megatron_replay.scoring.sqltext import has_order_by, joined_comparisons, without_distinct

# Tolerances of the strict rule: sums of floats depend on the order of their terms. The absolute one is for sums that
# cancel to 0.
RELATIVE, ABSOLUTE = 1e-6, 1e-9
_THIS_YEAR = re.compile(r"\byear\s*\(\s*curdate\s*\(\s*\)\s*\)", re.IGNORECASE)

Rows = Sequence[Row]


@dataclass(frozen=True)
class Rule:
    """A published way to judge a predicted query by the results of running it and the gold query."""

    name: str
    prepare: Callable[[str], str]
    """The text that is run, for a text that was written."""
    ordered: Callable[[str], bool]
    """True for a gold query whose order of rows counts."""
    same: Callable[[Rows, Rows, bool], bool]
    """same(predicted, gold, ordered): True where the results are equal."""
    counts_rows: bool
    """True where results of different lengths are never equal."""
    scores_failed_gold: bool
    """True where a question whose gold query fails is a wrong answer; False where it is left out."""


def find_rule(name: str) -> Rule:
    """The rule of that name. Raises ConfigError for an unknown one."""
    if name not in RULES:
        raise ConfigError(f"unknown SQL rule {name!r}; known: {', '.join(RULES)}")
    return RULES[name]


def spider_result(predicted: Rows, gold: Rows, ordered: bool) -> bool:
    """True where some order of the predicted columns gives the gold rows, as often; with `ordered`, in their order.

    Cells are equal as Python's values are: 1 equals 1.0, '1' is not 1, NULL equals NULL, and floats are not rounded.
    Two empty results are equal whatever their columns.
    """
    if not predicted and not gold:
        return True
    if len(predicted) != len(gold) or len(predicted[0]) != len(gold[0]):
        return False
    ours, theirs = list(zip(*predicted, strict=True)), list(zip(*gold, strict=True))
    if ordered:
        return Counter(ours) == Counter(theirs)
    return _columns_fit(ours, theirs, [])


def _columns_fit(ours: list[tuple[Cell, ...]], theirs: list[tuple[Cell, ...]], chosen: list[tuple[Cell, ...]]) -> bool:
    """Extend `chosen`, columns of ours for the first of theirs, as long as the rows so far are the same multiset."""
    width = len(chosen)
    if width == len(theirs):
        return True
    target = Counter(zip(*theirs[: width + 1], strict=True))
    for column in dict.fromkeys(ours):  # equal columns are tried once
        if Counter(zip(*chosen, column, strict=True)) == target:
            rest = list(ours)
            rest.remove(column)
            if _columns_fit(rest, theirs, [*chosen, column]):
                return True
    return False


def bird_result(predicted: Rows, gold: Rows, ordered: bool) -> bool:
    """True where the sets of rows are equal: neither order nor repetition counts, the order of columns does."""
    return set(predicted) == set(gold)


def same_result(predicted: Rows, gold: Rows, ordered: bool) -> bool:
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


def _spider_text(sql: str) -> str:
    """Join `> =`, drop DISTINCT, and read MySQL's year(curdate()) as 2020, as the script does to both queries."""
    return _THIS_YEAR.sub("2020", without_distinct(joined_comparisons(sql)))


RULES = {
    rule.name: rule
    for rule in (
        Rule(
            name="spider",
            prepare=_spider_text,
            ordered=lambda gold: "order by" in gold.lower(),  # the script looks no closer: a subquery's counts as well
            same=spider_result,
            counts_rows=True,
            scores_failed_gold=False,
        ),
        Rule(
            name="bird",
            prepare=str,
            ordered=lambda gold: False,
            same=bird_result,
            counts_rows=False,
            scores_failed_gold=True,
        ),
        Rule(
            name="strict",
            prepare=str,
            ordered=has_order_by,
            same=same_result,
            counts_rows=True,
            scores_failed_gold=False,
        ),
    )
}
