"""The verdicts of Spider's test-suite script, of BIRD's script and of the strict rule, pair by pair."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import ConfigError
from megatron_replay.scoring import RULES, Sandbox, execution_match, find_rule, gold_fault
from megatron_replay.scoring.sql_rules import spider_result
from megatron_replay.scoring.sqltext import joined_comparisons, without_distinct

SCRIPT = """
CREATE TABLE pet (name TEXT, age INTEGER, weight REAL, owner TEXT);
INSERT INTO pet VALUES ('Rex', 3, 0.1, 'Ada'), ('Tom', 7, 0.2, 'Ada'), ('Ivy', 5, 0.3, NULL), ('Zoe', 5, 0.4, 'Bob');
CREATE TABLE pair (a INTEGER, b INTEGER);
INSERT INTO pair VALUES (1, 2), (2, 1), (3, 3);
"""


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as box:
        yield box


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("db") / "pets.sqlite", SCRIPT)


def made(path: Path, script: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    with sqlite3.connect(path) as db:
        db.executescript(script)
    db.close()
    return path


# case: predicted, gold, and the verdicts of spider, bird and strict; y is right, n is wrong
PAIRS = {
    "other words": ("SELECT name FROM pet WHERE age > 4", "SELECT name FROM pet WHERE NOT age <= 4", "yyy"),
    "column order": ("SELECT age, name FROM pet", "SELECT name, age FROM pet", "ynn"),
    "column order, ordered": (
        "SELECT age, name FROM pet ORDER BY name",
        "SELECT name, age FROM pet ORDER BY name",
        "ynn",
    ),
    "columns that swap in some rows only": ("SELECT b, a FROM pair WHERE a = 1", "SELECT a, b FROM pair", "nnn"),
    "a set that is its own mirror": ("SELECT b, a FROM pair", "SELECT a, b FROM pair", "yyy"),
    "one column more": ("SELECT name, age FROM pet", "SELECT name FROM pet", "nnn"),
    "column names": ("SELECT name AS x FROM pet", "SELECT name FROM pet", "yyy"),
    "duplicates": ("SELECT 'Ada' UNION ALL SELECT 'Ada'", "SELECT 'Ada'", "nyn"),
    "duplicates of another row": (
        "SELECT 1 UNION ALL SELECT 1 UNION ALL SELECT 2",
        "SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 2",
        "nyn",
    ),
    "DISTINCT of the prediction": ("SELECT DISTINCT age FROM pet", "SELECT age FROM pet", "yyn"),
    "DISTINCT of the gold": ("SELECT age FROM pet", "SELECT DISTINCT age FROM pet", "yyn"),
    "DISTINCT that is counted": ("SELECT count(age) FROM pet", "SELECT count(DISTINCT age) FROM pet", "ynn"),
    "GROUP BY for DISTINCT": ("SELECT age FROM pet GROUP BY age", "SELECT DISTINCT age FROM pet", "nyy"),
    "order that nobody asked for": ("SELECT name FROM pet ORDER BY name DESC", "SELECT name FROM pet", "yyy"),
    "order that is missing": ("SELECT name FROM pet", "SELECT name FROM pet ORDER BY weight DESC", "nyn"),
    "order that is another": ("SELECT name FROM pet ORDER BY age", "SELECT name FROM pet ORDER BY age DESC", "nyn"),
    "ORDER BY with a tie in the order of the gold": (
        "SELECT name FROM pet ORDER BY age, weight",
        "SELECT name FROM pet ORDER BY age",
        "yyy",
    ),
    "ORDER BY with a tie the other way round": (
        "SELECT name FROM pet ORDER BY age, weight DESC",
        "SELECT name FROM pet ORDER BY age",
        "nyn",
    ),
    "a tie that the columns do not show": (
        "SELECT age FROM pet ORDER BY age, weight DESC",
        "SELECT age FROM pet ORDER BY age",
        "yyy",
    ),
    "ORDER BY in a subquery": (
        "SELECT name FROM pet WHERE age > 4 ORDER BY weight",
        "SELECT name FROM (SELECT name FROM pet WHERE age > 4 ORDER BY weight)",
        "yyy",
    ),
    "ORDER BY in a subquery, another order": (
        "SELECT name FROM pet WHERE age > 4 ORDER BY name DESC",
        "SELECT name FROM (SELECT name FROM pet WHERE age > 4 ORDER BY weight LIMIT 9)",
        "nyy",
    ),
    "ORDER BY over two blanks": ("SELECT name FROM pet ORDER BY age", "SELECT name FROM pet ORDER  BY weight", "yyn"),
    "NULL": ("SELECT NULL, 1", "SELECT owner, 1 FROM pet WHERE owner IS NULL", "yyy"),
    "NULL is not 0": ("SELECT 0", "SELECT NULL", "nnn"),
    "NULL is not an empty text": ("SELECT ''", "SELECT NULL", "nnn"),
    "an integer and the same float": ("SELECT 2.0", "SELECT 2", "yyy"),
    "a number and its text": ("SELECT '2'", "SELECT 2", "nnn"),
    "a float in its last bit": ("SELECT 0.1 + 0.2", "SELECT 0.3", "nny"),
    "a float in its fifth digit": ("SELECT 1.00001", "SELECT 1.0", "nnn"),
    "large integers": ("SELECT 9007199254740993", "SELECT 9007199254740992", "nnn"),
    "upper case": ("SELECT 'ada'", "SELECT 'Ada'", "nnn"),
    "both empty": ("SELECT name FROM pet WHERE age > 9", "SELECT age FROM pet WHERE age > 99", "yyy"),
    "both empty, other columns": ("SELECT 1, 2 WHERE 0", "SELECT age FROM pet WHERE age > 99", "yyy"),
    "empty for rows": ("SELECT name FROM pet WHERE age > 9", "SELECT name FROM pet", "nnn"),
    "a blank in a comparison": ("SELECT name FROM pet WHERE age > = 5", "SELECT name FROM pet WHERE age >= 5", "ynn"),
    "MySQL's year": ("SELECT year ( curdate() ) - age FROM pet", "SELECT 2020 - age FROM pet", "ynn"),
    "a fault": ("SELECT nme FROM pet", "SELECT name FROM pet", "nnn"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", PAIRS)
def test_verdict(sandbox: Sandbox, database: Path, case: str, rule: str) -> None:
    predicted, gold, verdicts = PAIRS[case]
    right = dict(zip(("spider", "bird", "strict"), verdicts, strict=True))[rule] == "y"
    match = execution_match(database, predicted, gold, rule=rule, sandbox=sandbox)
    assert match.correct is right, match.reason


def test_an_unknown_rule_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown SQL rule 'spidr'; known: spider, bird, strict"):
        find_rule("spidr")


CELLS = st.sampled_from([0, 1, 2.5, "a", None])
TABLES = st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[CELLS] * width), min_size=1, max_size=5))


@given(rows=TABLES, data=st.data())
@settings(deadline=None, max_examples=100)
def test_spider_takes_any_order_of_columns_and_rows(rows, data) -> None:
    columns = data.draw(st.permutations(range(len(rows[0]))))
    turned = [tuple(row[i] for i in columns) for row in rows]
    assert spider_result(turned, rows, True)
    assert spider_result(data.draw(st.permutations(turned)), rows, False)


@given(rows=TABLES, data=st.data())
@settings(deadline=None, max_examples=100)
def test_spider_refuses_a_cell_that_is_nowhere_else(rows, data) -> None:
    changed = [list(row) for row in rows]
    changed[data.draw(st.integers(0, len(rows) - 1))][data.draw(st.integers(0, len(rows[0]) - 1))] = "new"
    assert not spider_result([tuple(row) for row in changed], rows, data.draw(st.booleans()))


def test_spider_wants_one_permutation_for_all_rows() -> None:
    """Each column has the same values, and each row the same set: only whole columns may move."""
    gold = [(1, 2, 3), (2, 3, 1), (3, 1, 2)]
    assert spider_result([(row[2], row[0], row[1]) for row in gold], gold, False)
    assert not spider_result([(1, 2, 3), (2, 1, 3), (3, 3, 2)], gold, False)
    assert not spider_result([(1, 3), (2, 1)], [(1, 1), (2, 3)], False)


def test_spider_is_quick_on_wide_results() -> None:
    gold = [tuple((row * column) % 7 for column in range(1, 25)) for row in range(50)]
    assert spider_result([row[::-1] for row in gold[::-1]], gold, False)


DISTINCT = [
    ("SELECT DISTINCT a FROM t", "SELECT  a FROM t"),
    ("select count(distinct a) from t", "select count( a) from t"),
    ("SELECT 'distinct', \"DISTINCT\" FROM t", "SELECT 'distinct', \"DISTINCT\" FROM t"),
    ("SELECT a IS DISTINCT FROM b", "SELECT a IS DISTINCT FROM b"),
    ("SELECT DISTINCT a IS NOT DISTINCT FROM b", "SELECT  a IS NOT DISTINCT FROM b"),
]


@pytest.mark.parametrize(("sql", "without"), DISTINCT)
def test_without_distinct(sql: str, without: str) -> None:
    assert without_distinct(sql) == without


@pytest.mark.parametrize(
    ("sql", "joined"),
    [("a > = 1 AND b < = 2", "a >= 1 AND b <= 2"), ("a ! = '> ='", "a != '> ='"), ("a >  = 1", "a >  = 1")],
)
def test_joined_comparisons(sql: str, joined: str) -> None:
    assert joined_comparisons(sql) == joined


def test_a_test_suite_is_passed_on_every_database(sandbox: Sandbox, tmp_path: Path) -> None:
    """On the first database both conditions give the same rows; the second tells them apart."""
    first = made(tmp_path / "first.sqlite", "CREATE TABLE t (a INT); INSERT INTO t VALUES (1), (5);")
    second = made(tmp_path / "second.sqlite", "CREATE TABLE t (a INT); INSERT INTO t VALUES (3), (5);")
    predicted, gold = "SELECT a FROM t WHERE a > 2", "SELECT a FROM t WHERE a > 3"
    assert execution_match([first], predicted, gold, sandbox=sandbox).correct
    match = execution_match([first, second], predicted, gold, sandbox=sandbox)
    assert (match.correct, match.reason) == (False, "second: 2 rows, gold has 1")
    assert execution_match([first, second], gold, gold, sandbox=sandbox).correct


def test_a_gold_query_at_fault_is_told(sandbox: Sandbox, tmp_path: Path) -> None:
    def fault(gold: str, *more: Path, rule: str = "spider", max_rows: int = 3) -> str | None:
        return gold_fault([path, *more], gold, rule=rule, sandbox=sandbox, seconds=2.0, max_rows=max_rows)

    path = made(tmp_path / "one.sqlite", "CREATE TABLE t (a INT); INSERT INTO t VALUES (1), (2), (3), (4);")
    bare = made(tmp_path / "bare.sqlite", "CREATE TABLE u (a INT);")
    assert fault("SELECT a FROM t LIMIT 3") is None
    assert fault("SELECT a FROM t") == "row limit of 3"
    assert fault("SELECT a FROM t", max_rows=4) is None
    assert fault("SELECT a FROM missing") == "no such table: missing"
    assert fault("SELECT 1 FROM t LIMIT 1", bare) == "bare: no such table: t"
    assert fault("SELECT a FROM t WHERE a > = 4") is None and fault("SELECT a FROM t WHERE a > = 4", rule="bird")
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    assert gold_fault([path], endless, rule="strict", sandbox=sandbox, seconds=0.1, max_rows=3) == "time limit of 0.1 s"
