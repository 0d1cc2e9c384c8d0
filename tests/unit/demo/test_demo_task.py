"""The demo's own task: the same from the same seed, held-out databases really held out, and every query worth
asking."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_replay.demo import task as demo_task
from megatron_replay.demo.database_schemas import TEST, TRAIN
from megatron_replay.demo.questions import TEMPLATES, quoted
from megatron_replay.demo.task import GENERAL_TEXT, TaskFiles, make_task
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.scoring.sql import Sandbox, execution_match, extract_sql, has_order_by


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskFiles:
    return make_task(tmp_path_factory.mktemp("task"))


def test_sizes_and_fields(task: TaskFiles) -> None:
    train, test = read(task.train), read(task.test)
    assert (len(train), len(test)) == (600, 120)
    for example in train + test:
        assert set(example) == {"db_id", "prompt", "completion", "query"}
        assert example["completion"] == example["query"] == extract_sql(example["completion"])
        assert re.fullmatch(r"Schema:\n(\w+\(.*\)\n){3}Question: [^\n{}]+[.?]\nSQL:\n", example["prompt"])
        assert len(example["prompt"] + example["query"]) < 520  # characters: well under 200 tokens


def test_same_seed_same_bytes_other_seed_other_task(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        make_task(tmp_path / name, seed=seed, train=64, test=16)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["train.jsonl"] != content(tmp_path / "c")["train.jsonl"]
    make_task(tmp_path / "c", seed=3, train=64, test=16)
    assert content(tmp_path / "a") == content(tmp_path / "c"), "an earlier task in the folder must be replaced"


def test_splits_share_no_database_table_or_example(task: TaskFiles) -> None:
    train, test = read(task.train), read(task.test)
    assert {e["db_id"] for e in train} == {s.db_id for s in TRAIN} and {e["db_id"] for e in test} == {
        s.db_id for s in TEST
    }
    names = [table.name for schema in TRAIN + TEST for table in schema.tables]
    assert len(names) == len(set(names)) == 18
    pairs = Counter((e["prompt"].split("Question: ")[1], e["query"]) for e in train + test)
    assert max(pairs.values()) == 1
    assert max(Counter((e["db_id"], e["query"]) for e in train + test).values()) == 1


def test_databases_are_used_alike_and_all_templates_occur(task: TaskFiles) -> None:
    train, test = read(task.train), read(task.test)
    assert set(Counter(e["db_id"] for e in train).values()) == {150} and set(
        Counter(e["db_id"] for e in test).values()
    ) == {60}
    for split in (train, test):
        for words in (
            "COUNT(*)",
            "AVG(",
            "GROUP BY",
            "HAVING",
            "ORDER BY",
            "LIMIT",
            "JOIN",
            "NOT IN (SELECT",
            "> (SELECT",
            "DISTINCT",
            "BETWEEN",
            "LIKE",
        ):
            assert any(words in e["query"] for e in split), words


def test_every_query_runs_finds_something_and_matches_itself(task: TaskFiles) -> None:
    examples = read(task.train) + read(task.test)
    with Sandbox() as sandbox:
        found = 0
        for example in examples:
            database = task.databases / f"{example['db_id']}.sqlite"
            assert execution_match(database, example["completion"], example["query"], sandbox=sandbox).correct, example
            found += bool(sandbox.execute(database, example["query"]).rows)
    assert found == len(examples)


def test_the_scorer_tells_the_queries_apart(task: TaskFiles) -> None:
    """A task whose queries all return the same would be passed by any answer: another query of the same database is
    nearly always wrong."""
    test = sorted(read(task.test), key=lambda example: example["db_id"])
    pairs = [(a, b) for a, b in pairwise(test) if a["db_id"] == b["db_id"]]
    with Sandbox() as sandbox:
        right = sum(
            execution_match(task.databases / f"{a['db_id']}.sqlite", b["query"], a["query"], sandbox=sandbox).correct
            for a, b in pairs
        )
    assert right <= 0.05 * len(pairs)


def test_templates_that_ask_for_an_order_are_ordered() -> None:
    ordered = {template.name for template in TEMPLATES if has_order_by(template.sql)}
    assert ordered == {"order", "order_where", "top", "top_k", "most_common"}
    assert all(
        bool(re.search(r" first\.|\bsort", re.sub(r"\{\w+\}", "", text).lower()))
        == (template.name in ("order", "order_where"))
        for template in TEMPLATES
        for text in template.asked
    )
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES) >= 25


def test_sorted_numbers_have_no_ties_and_links_point_somewhere(task: TaskFiles) -> None:
    for schema in TRAIN + TEST:
        with closing(sqlite3.connect(task.databases / f"{schema.db_id}.sqlite")) as db:
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            for table in schema.tables:
                for name in (table.label.name, *(number.name for number in table.numbers)):
                    count, different = db.execute(
                        f'SELECT COUNT(*), COUNT(DISTINCT "{name}") FROM {table.name}'
                    ).fetchone()
                    assert count == different == table.rows and 20 <= count <= 60
                for link in table.links:
                    query = f"SELECT COUNT(*) FROM {link.parent} WHERE id NOT IN (SELECT {link.name} FROM {table.name})"
                    assert db.execute(query).fetchone()[0] >= 3


@pytest.mark.parametrize("sizes", [{"train": 0}, {"test": 0}, {"train": -5}])
def test_sizes_that_cannot_be_had(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(sizes.values())))):
        make_task(tmp_path, **sizes)


def test_more_than_the_templates_can_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_task, "TEMPLATES", TEMPLATES[:1])  # one count for each of three tables
    with pytest.raises(ConfigError, match="give 12 different queries on 4 databases, not 13"):
        make_task(tmp_path, train=13, test=1)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the demo task"):
        make_task(tmp_path / "file" / "task", train=4, test=2)


def test_quotes_in_values_are_escaped() -> None:
    assert quoted("O'Hara") == "'O''Hara'"


def test_general_text_is_prose_of_a_few_pages() -> None:
    text = GENERAL_TEXT.read_text(encoding="utf-8")
    assert 6_000 < len(text) < 9_000 and text.isascii() and text.count("\n\n") >= 8
