"""Spider's levels of hardness: what counts, and what the published script gives for queries of each level."""

from __future__ import annotations

import pytest

from megatron_replay.scoring import LEVELS, hardness

# The levels are those that eval_hardness of taoyds/test-suite-sql-eval gives, but for the last block.
CASES = [
    ("SELECT name FROM t", "easy"),
    ("SELECT count(*) FROM t WHERE a > 1", "easy"),
    ("SELECT name FROM t ORDER BY age DESC", "easy"),
    ("SELECT DISTINCT name FROM t WHERE a BETWEEN 1 AND 2", "easy"),
    ("SELECT name FROM t JOIN u ON t.a = u.a", "easy"),
    ("SELECT name FROM t WHERE a LIKE '%x%'", "medium"),
    ("SELECT name, age FROM t", "medium"),
    ("SELECT name FROM t ORDER BY age LIMIT 1", "medium"),
    ("SELECT name, age FROM t WHERE a = 1 AND b = 2", "medium"),
    ("SELECT name FROM t WHERE a = 1 AND b = 2", "medium"),
    ("SELECT a, count(*) FROM t GROUP BY a", "medium"),
    ("SELECT max(a), min(a) FROM t", "medium"),
    ("SELECT a FROM t JOIN u ON t.a = u.a WHERE t.b = 'where or like'", "medium"),
    ("SELECT a FROM t WHERE b NOT IN (SELECT b FROM u)", "hard"),
    ("SELECT a FROM t UNION SELECT a FROM u", "hard"),
    ("SELECT a FROM t JOIN u ON t.a = u.a WHERE b = 1 ORDER BY c", "hard"),
    ("SELECT a FROM t JOIN u ON t.a = u.a JOIN v ON u.b = v.b WHERE v.c = 1", "hard"),
    ("SELECT a FROM t GROUP BY a HAVING count(*) > 2 ORDER BY count(*) LIMIT 3", "hard"),
    ("SELECT a, max(b), min(b) FROM t WHERE c = 1 AND d = 2 GROUP BY a, e", "hard"),
    ("SELECT a FROM t WHERE b = 1 AND c NOT IN (SELECT c FROM u)", "extra"),
    ("SELECT a, b FROM t WHERE c > (SELECT avg(c) FROM t)", "extra"),
    ("SELECT a FROM t JOIN u ON t.a = u.a WHERE b = 1 OR b = 2 ORDER BY c LIMIT 1", "extra"),
    ("SELECT a FROM t WHERE b = 1 EXCEPT SELECT a FROM t JOIN u ON t.a = u.a WHERE c = 1", "hard"),
    ("SELECT a, b FROM t EXCEPT SELECT a, b FROM u", "extra"),
    # read alike, though Spider's grammar lacks it
    ("SELECT a FROM (SELECT a FROM t WHERE b = 1 OR c = 2)", "easy"),
    ("WITH x AS (SELECT a FROM t) SELECT a FROM x", "hard"),
    ("SELECT (SELECT max(a) FROM t)", "hard"),
    ("SELECT a FROM t, u, v WHERE t.a = u.a", "hard"),
    ("", "easy"),
]


@pytest.mark.parametrize(("sql", "level"), CASES)
def test_hardness(sql: str, level: str) -> None:
    assert hardness(sql) == level
    assert hardness(sql.upper()) == level and level in LEVELS
