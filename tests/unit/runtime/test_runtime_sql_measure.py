"""The measure nl2sql: gold queries that fail are set apart first, levels, verdicts, and its line for each question."""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_replay.config import Evaluate
from megatron_replay.errors import DataError
from megatron_replay.runtime import sql_measure
from megatron_replay.runtime.sql_questions import read_sql_questions

ASKED = [
    {"prompt": "Names?", "db_id": "d", "query": "SELECT name FROM t", "uid": "first"},
    {"prompt": "Rows?", "db_id": "d", "query": "SELECT count(*) FROM missing"},
    {"prompt": "Numbers?", "db_id": "d", "query": "SELECT n FROM big", "difficulty": "challenging"},
    {"prompt": "Oldest?", "db_id": "d", "query": "SELECT name FROM t ORDER BY age DESC LIMIT 1"},
]
ANSWERS = {
    "Names?": "```sql\nSELECT DISTINCT name FROM t\n```",
    "Numbers?": "SELECT n FROM big",
    "Oldest?": "I do not know.",
}
SCRIPT = """
CREATE TABLE t (name TEXT, age INT);
INSERT INTO t VALUES ('Ann', 30), ('Bob', 40);
CREATE TABLE big (n INT);
INSERT INTO big VALUES (1), (2), (3), (4), (5);
"""


def made(path: Path, script: str = SCRIPT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as db:
        db.executescript(script)
    db.close()
    return path


def asking(folder: Path, records: list[dict[str, Any]], **keys: Any) -> Evaluate:
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return Evaluate(nl2sql=str(file), databases=str(folder / "databases"), **keys)


class Told(list[str]):
    """All that is said and generated, in order."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    heard = Told()

    def generate(model: object, prompts: list[str], **_: Any) -> list[str]:
        heard.extend(f"asked {prompt}" for prompt in prompts)
        return [ANSWERS[prompt] for prompt in prompts]

    monkeypatch.setattr(sql_measure, "generate", generate)
    return heard


def session(asked: Evaluate, told: Told) -> Any:
    """A session of one rank whose tokens are texts."""

    @contextmanager
    def progress(*_: Any):
        yield lambda _: None

    world = SimpleNamespace(rank=0, size=1, gather_objects=lambda value: [value])
    return SimpleNamespace(
        config=SimpleNamespace(evaluate=asked),
        world=world,
        model=None,
        vocab_size=0,
        stop_ids=(),
        tokenizer=SimpleNamespace(decode=str),
        template=SimpleNamespace(prompt=lambda turns: turns[-1].content),
        say=told.append,
        progress=progress,
    )


def test_gold_queries_that_fail_are_told_and_set_apart_before_generating(tmp_path: Path, told: Told) -> None:
    made(tmp_path / "databases" / "d.sqlite")
    asked = asking(tmp_path, ASKED, sql_rows=4)
    result = sql_measure.nl2sql(session(asked, told))
    lines = result.pop("rows")
    assert told[0].startswith("nl2sql: 2 of 4 gold queries fail, and their questions are left out (sql_rule=spider;")
    assert f"{asked.nl2sql}:2: no such table: missing\n  {asked.nl2sql}:3: row limit of 4" in told[1]
    assert told[2:] == ["asked Names?", "asked Oldest?"]
    assert (result["rule"], result["questions"], result["scored"], result["gold_failed"]) == ("spider", 4, 2, 2)
    assert result["execution"].value == 0.5 and result["exact"].value == 0
    assert {level: (part["execution"].value, part["questions"]) for level, part in result["hardness"].items()} == {
        "easy": (1.0, 1),
        "medium": (0.0, 1),
    }
    assert [failure["reason"] for failure in result["gold_failures"]] == [
        "gold query failed: no such table: missing",
        "gold query failed: row limit of 4",
    ]
    assert [line["verdict"] for line in lines] == ["right", "left out", "left out", "wrong"]
    assert lines[0]["question"] == "first" and len({line["question"] for line in lines}) == 4
    assert [line.get("correct") for line in lines] == [True, None, None, False]
    first = dict(lines[0])
    assert first.pop("seconds") > 0
    assert first == {
        "question": "first",
        "correct": True,
        "db_id": "d",
        "hardness": "easy",
        "prompt": "Names?",
        "answer": ANSWERS["Names?"],
        "predicted": "SELECT DISTINCT name FROM t",
        "gold": "SELECT name FROM t",
        "rule": "spider",
        "verdict": "right",
        "reason": "same result",
        "exact": False,
    }
    assert lines[3]["reason"] == "query failed: refused: 'i' is not SELECT"


def test_with_birds_rule_they_are_wrong_answers(tmp_path: Path, told: Told) -> None:
    made(tmp_path / "databases" / "d" / "d.sqlite")
    result = sql_measure.nl2sql(session(asking(tmp_path, ASKED, sql_rule="bird", sql_rows=4), told))
    assert "count as wrong (sql_rule=bird" in told[0] and told[2:] == ["asked Names?", "asked Oldest?"]
    assert (result["scored"], result["gold_failed"], result["execution"].value) == (4, 2, 0.25)
    assert [line["verdict"] for line in result["rows"]] == ["right", "wrong", "wrong", "wrong"]
    assert list(result["hardness"]) == ["easy", "medium", "challenging"]


def test_a_larger_limit_takes_the_question_in(tmp_path: Path, told: Told) -> None:
    made(tmp_path / "databases" / "d.sqlite")
    result = sql_measure.nl2sql(session(asking(tmp_path, ASKED, sql_rows=5), told))
    assert (result["scored"], result["gold_failed"]) == (3, 1)
    assert result["hardness"]["challenging"]["execution"].value == 1 and result["exact"].value == pytest.approx(1 / 3)


def test_without_a_gold_query_that_runs_nothing_is_generated(tmp_path: Path, told: Told) -> None:
    made(tmp_path / "databases" / "d.sqlite")
    asked = asking(tmp_path, ASKED[1:3], sql_rows=4)
    with pytest.raises(DataError, match=r"no gold query runs within .*sql_rows=4; .*: no such table: missing"):
        sql_measure.nl2sql(session(asked, told))
    assert not told


def test_a_test_suite_wants_all_of_its_databases_right(tmp_path: Path, told: Told) -> None:
    folder = tmp_path / "databases" / "d"
    made(folder / "a.sqlite", SCRIPT + "INSERT INTO t VALUES ('Bob', 50);")
    made(folder / "d.sqlite")
    asked = asking(tmp_path, ASKED[:1], sql_rule="strict")
    assert [path.name for path in read_sql_questions(asked)[0].databases] == ["d.sqlite", "a.sqlite"]
    line = sql_measure.nl2sql(session(asked, told))["rows"][0]
    assert (line["verdict"], line["reason"]) == ("wrong", "a: 2 rows, gold has 3")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"db_id": "none"}, r"asked.jsonl:1: no database .*none.sqlite; .*folders <db_id> with .sqlite files"),
        ({"db_id": "empty"}, "no database .*empty.sqlite"),
        ({"db_id": ".."}, "db_id '..' is no plain name"),
        ({"db_id": ""}, "db_id '' is no plain name"),
        ({"db_id": "suite"}, "suite/torn.sqlite is no SQLite database; copy the file again"),
        ({"query": None}, "needs the keys db_id and query"),
    ],
)
def test_a_question_that_cannot_be_asked(tmp_path: Path, record: dict[str, Any], says: str) -> None:
    databases = tmp_path / "databases"
    made(databases / "d.sqlite")
    made(databases / "suite" / "suite.sqlite")
    (databases / "suite" / "torn.sqlite").write_text("torn")
    (databases / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        read_sql_questions(asking(tmp_path, [ASKED[0] | record]))


def test_the_uid_is_the_datas_own_or_of_the_text(tmp_path: Path) -> None:
    made(tmp_path / "databases" / "d.sqlite")
    plain = {key: value for key, value in ASKED[0].items() if key != "uid"}
    one, other, numbered = read_sql_questions(
        asking(tmp_path, [plain, plain | {"prompt": "Name?"}, plain | {"question_id": 7}])
    )
    assert len(one.uid) == 16 and one.uid != other.uid and numbered.uid == "7"
    again = read_sql_questions(asking(tmp_path, [plain | {"hardness": "extra"}]))[0]
    assert again.uid == one.uid and (one.level, again.level) == ("easy", "extra")
