"""Spider's four levels of hardness, read from the text of a query.

They are those of Yu et al. (EMNLP 2018), as `eval_hardness` of taoyds/test-suite-sql-eval gives them.

The script counts three kinds of components of the outermost query, left of a set operation:

1. WHERE, GROUP BY, ORDER BY, LIMIT, every table after the first, every OR and every LIKE in a condition
2. queries nested in a condition, and a set operation
3. more than one aggregate, column, condition in WHERE, or column in GROUP BY: one each

It counts a negated condition as an aggregate, and a query nested in FROM as a table; so do we. What Spider's grammar
lacks is read alike: a common table expression and a query in the SELECT list are nested queries, a comma in FROM joins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_replay.scoring.sqltext import Token, tokens

LEVELS = ("easy", "medium", "hard", "extra")

_AGGREGATES = ("max", "min", "count", "sum", "avg")
_CLAUSES = ("select", "from", "where", "group", "having", "order", "limit")
_SET_OPERATIONS = ("union", "intersect", "except")
_NESTED = "(select)"
"""Stands for a whole nested query."""


def hardness(sql: str) -> str:
    """One of `LEVELS`."""
    clauses, nested = _clauses(list(tokens(sql)))
    one, two, three = _first(clauses), nested + _nested(clauses), _others(clauses)
    if two == 0 and one <= 1 and three == 0:
        return "easy"
    if two == 0 and ((one <= 1 and three <= 2) or (one <= 2 and three < 2)):
        return "medium"
    if two == 0 and ((one <= 2 and three > 2) or (one == 3 and three <= 2)):
        return "hard"
    return "hard" if two == 1 and one <= 1 and three == 0 else "extra"


@dataclass
class _Clause:
    """The words of a clause in lower case, each with its depth in parentheses. Literals are empty words."""

    words: list[str] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    def count(self, *wanted: str) -> int:
        return sum(word in wanted for word in self.words)

    def items(self) -> int:
        """Parts between commas outside parentheses."""
        return sum(word == "," and depth == 0 for word, depth in zip(self.words, self.depths, strict=True)) + 1

    def aggregates(self) -> int:
        pairs = zip(self.words, self.words[1:], strict=False)
        return sum(word in _AGGREGATES and after == "(" for word, after in pairs)

    def negations(self) -> int:
        """NOT, but for IS NOT."""
        return sum(
            word == "not" and before != "is" for before, word in zip(["", *self.words], self.words, strict=False)
        )

    def connections(self) -> int:
        """AND and OR, but for the AND of a BETWEEN."""
        return self.count("and", "or") - self.count("between")

    def conditions(self) -> _Clause:
        """Of a FROM clause: all that stands after an ON and before the next JOIN."""
        found, inside = _Clause(), False
        for word, depth in zip(self.words, self.depths, strict=True):
            inside = word == "on" or (inside and word != "join")
            if inside:
                found.words.append(word)
                found.depths.append(depth)
        return found


def _clauses(sql: Sequence[Token]) -> tuple[dict[str, _Clause], int]:
    """The clauses of the outermost query, and the number of set operations (0 or 1) and common table expressions."""
    found: dict[str, _Clause] = {}
    current, depth, nested, i = _Clause(), 0, 0, 0
    while i < len(sql):
        word = sql[i].text.lower() if sql[i].kind in ("word", "mark") else ""
        if word == "(" and i + 1 < len(sql) and sql[i + 1].text.lower() in ("select", "with"):
            i, word = _close(sql, i), _NESTED
            nested += "select" not in found  # it is a common table expression
        elif depth == 0 and word in _SET_OPERATIONS and "select" in found:
            return found, nested + 1
        elif depth == 0 and word in _CLAUSES:
            current = found.setdefault(word, _Clause())
            i += 1
            continue
        depth -= word == ")"
        current.words.append(word)
        current.depths.append(depth)
        depth += word == "("
        i += 1
    return found, nested


def _close(sql: Sequence[Token], start: int) -> int:
    """The index of the parenthesis that closes the one at `start`, or the end."""
    depth = 0
    for i in range(start, len(sql)):
        depth += {"(": 1, ")": -1}.get(sql[i].text, 0)
        if depth == 0:
            return i
    return len(sql)


def _get(clauses: dict[str, _Clause], name: str) -> _Clause:
    return clauses.get(name, _Clause())


def _first(clauses: dict[str, _Clause]) -> int:
    tables = _get(clauses, "from")
    joined = tables.count("join") + tables.items() - 1
    conditions = (tables.conditions(), _get(clauses, "where"), _get(clauses, "having"))
    return (
        sum(name in clauses for name in ("where", "group", "order", "limit"))
        + joined
        + sum(part.count("or", "like") for part in conditions)
    )


def _nested(clauses: dict[str, _Clause]) -> int:
    parts = (_get(clauses, name) for name in ("select", "where", "having"))
    return sum(part.count(_NESTED) for part in (*parts, _get(clauses, "from").conditions()))


def _others(clauses: dict[str, _Clause]) -> int:
    aggregates = sum(_get(clauses, name).aggregates() for name in ("select", "group", "order"))
    negations = sum(_get(clauses, name).negations() for name in ("where", "having"))
    return (
        (aggregates + negations > 1)
        + (_get(clauses, "select").items() > 1)
        + (_get(clauses, "where").connections() > 0)
        + (_get(clauses, "group").items() > 1)
    )
