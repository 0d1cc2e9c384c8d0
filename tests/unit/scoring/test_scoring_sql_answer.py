"""The query in a model's answer: thoughts, fences, explanations and several statements around it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.scoring import extract_sql

CTES = "WITH a AS (\n  SELECT 1 AS x\n),\n\nb AS (\n  SELECT x FROM a\n)\n\nSELECT x FROM b"

EXTRACTED = [
    ("SELECT 1", "SELECT 1"),
    (" SELECT a FROM t;\nThat lists all.", "SELECT a FROM t"),
    ("Here you are:\n```sql\nSELECT a\nFROM t\n```\nIt selects a.", "SELECT a\nFROM t"),
    ("```\nselect 1;\n```", "select 1"),
    ("```sql\nSELECT a FROM", "SELECT a FROM"),
    ("I will select the rows with care.\nSELECT a FROM t", "SELECT a FROM t"),
    ("The answer: SELECT a FROM t", "SELECT a FROM t"),
    ("With this schema, use:\nWITH x AS (SELECT 1) SELECT * FROM x;", "WITH x AS (SELECT 1) SELECT * FROM x"),
    ("SELECT a FROM t\n\nThis query's result", "SELECT a FROM t"),
    ("SELECT 'a;b' FROM t; SELECT 2", "SELECT 'a;b' FROM t"),
    ("SELECT 'a\n\nb' FROM t", "SELECT 'a\n\nb' FROM t"),
    ("SELECT a FROM t<|im_end|>\nSELECT b", "SELECT a FROM t"),
    ("SELECT a FROM t</s>", "SELECT a FROM t"),
    ("SELECT a FROM t\n```\nDone", "SELECT a FROM t"),
    ("SELECT a FROM t\n```sql\nSELECT b\n```", "SELECT a FROM t"),
    ("DROP TABLE t; SELECT", "SELECT"),
    ("I don't know.", "I don't know."),
    ("", ""),
    # fences
    ("```sql\nSELECT a\n\nFROM t\n\nWHERE b = 1;\n```", "SELECT a\n\nFROM t\n\nWHERE b = 1"),
    (f"```sql\n{CTES};\n```\nDone.", CTES),
    (f"Here:\n\n```SQL\n{CTES}\n```", CTES),
    ("First:\n```sql\nSELECT a\n```\nBetter:\n```sql\nSELECT b\n```", "SELECT b"),
    ("```sql\nSELECT a\n```\nIt gives:\n```\n| a |\n| 1 |\n```", "SELECT a"),
    ("```sql\nSELECT a\n```\nas in\n```python\nrun(query)\n```", "SELECT a"),
    ("I try:\nSELECT a FROM t\nNo:\n```sql\nSELECT b FROM t\n```", "SELECT b FROM t"),
    ("Select the names of all:\n```sql\nSELECT b FROM t\n```", "SELECT b FROM t"),
    ("Select the names of all\n```sql\nSELECT b FROM t\n```", "SELECT b FROM t"),
    ("```postgresql\nSELECT a\n```", "SELECT a"),
    ("```sql SELECT a FROM t```", "SELECT a FROM t"),
    ("```SELECT a FROM t```", "SELECT a FROM t"),
    ("```\nSELECT\na FROM t\n```", "SELECT\na FROM t"),
    ("```sql\n-- it's all names\nSELECT a FROM t\n```", "SELECT a FROM t"),
    ("```sql\nSELECT a -- the key\nFROM t -- all\n```", "SELECT a -- the key\nFROM t"),
    ("```sql\nPRAGMA table_info(t);\nSELECT a FROM t;\nSELECT b FROM t;\n```", "SELECT a FROM t"),
    ("SELECT a\n```\nThis is it.\n```sql\nSELECT b\n```", "SELECT a"),
    # thoughts
    ("<think>\nSELECT a FROM t\n</think>\n\nSELECT b FROM t", "SELECT b FROM t"),
    ("SELECT a FROM t is wrong.\n</think>\n```sql\nSELECT b FROM t\n```", "SELECT b FROM t"),
    ("<think>\n```sql\nSELECT a\n```\n</think>\nSELECT b", "SELECT b"),
    ("<think>\nSELECT a FROM t, or perhaps", ""),
    # without a fence
    (CTES + "\n\nThis is the query.", CTES),
    ("SELECT a FROM (\n\n  SELECT a FROM t\n\n)\n\nDone", "SELECT a FROM (\n\n  SELECT a FROM t\n\n)"),
    ("SELECT a FROM t\n\nFrom the above table it takes all.", "SELECT a FROM t"),
    ("SELECT a,\n\nb FROM t", "SELECT a,\n\nb FROM t"),
    ("SELECT a\nFROM t\nThis query lists all of them.", "SELECT a\nFROM t"),
    ("SELECT a\nFROM t\nNote: a is the key.", "SELECT a\nFROM t"),
    ("SELECT a\nFROM t\n**Explanation** of it", "SELECT a\nFROM t"),
    ("SELECT a name\nFROM t\nLEFT JOIN u ON t.a = u.a", "SELECT a name\nFROM t\nLEFT JOIN u ON t.a = u.a"),
    ("-- all names\nSELECT a FROM t", "SELECT a FROM t"),
    ("/* select all */ SELECT a FROM t", "SELECT a FROM t"),
    ("(SELECT a FROM t);", "SELECT a FROM t"),
    ("((SELECT a FROM t))", "SELECT a FROM t"),
    ("(SELECT a FROM t) is what you want", "SELECT a FROM t"),
    ("The answer (SELECT a FROM t) is short.", "SELECT a FROM t"),
    ("(SELECT a FROM t) UNION SELECT count(*) FROM u", "(SELECT a FROM t) UNION SELECT count(*) FROM u"),
    ("(SELECT a) EXCEPT (SELECT b)", "(SELECT a) EXCEPT (SELECT b)"),
    ("Use `SELECT a FROM t` here.", "SELECT a FROM t"),
    ("The answer is SELECT a FROM t.", "SELECT a FROM t"),
    ("WITH RECURSIVE n(i) AS (SELECT 1) SELECT i FROM n", "WITH RECURSIVE n(i) AS (SELECT 1) SELECT i FROM n"),
]


@pytest.mark.parametrize(("answer", "sql"), EXTRACTED)
def test_extract_sql(answer: str, sql: str) -> None:
    assert extract_sql(answer) == sql


@pytest.mark.parametrize("sql", sorted({sql for _, sql in EXTRACTED if sql.startswith(("SELECT ", "WITH"))}))
@pytest.mark.parametrize("around", ["{}", "{};", "```sql\n{}\n```", "I say:\n\n{};\nIt is so.", "<think>x</think>{}"])
def test_a_query_alone_is_itself(sql: str, around: str) -> None:
    assert extract_sql(around.format(sql)) == sql


@given(st.text(alphabet="SELECT WITHa1,.'\"`;-\n()*#:<think/>", max_size=60))
@settings(deadline=None, max_examples=200)
def test_any_text_is_taken(text: str) -> None:
    assert extract_sql(text) in text
