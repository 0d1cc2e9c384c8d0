"""A small NL2SQL task made from a seed alone: six invented SQLite databases, and questions about them with their SQL.

Four databases are for training. Two are held out, so the model is measured on schemas it has never seen. Nothing is
downloaded.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_replay.demo.database_schemas import TEST, TRAIN, DatabaseSchema, Link, Number, Table
from megatron_replay.demo.questions import TEMPLATES, Rows, ask
from megatron_replay.errors import ConfigError, DataError

GENERAL_TEXT = Path(__file__).with_name("text.txt")
"""Plain English prose. Its perplexity shows how much fine-tuning forgot."""
TRIES = 40
"""Tries for a new query of one template on one database, after which the template counts as used up there."""


@dataclass(frozen=True)
class TaskFiles:
    """The paths of the task's parts."""

    train: Path
    test: Path
    databases: Path


def make_task(folder: str | Path, seed: int = 7, train: int = 600, test: int = 120) -> TaskFiles:
    """Write `train.jsonl`, `test.jsonl` and `databases/<db_id>.sqlite` into the folder.

    The same arguments give the same bytes. A line is {"db_id", "prompt", "completion", "query"}. The prompt is the
    schema and a question; the completion and `query` are its SQL. Every query runs, returns at least one row, and
    occurs once. Files of an earlier task are replaced.

    Raises ConfigError for sizes below 1 or above the number the templates can give, DataError when the folder cannot be
    written.
    """
    if min(train, test) < 1:
        raise ConfigError(f"the demo task needs at least one example in each split, got train={train}, test={test}")
    task = TaskFiles(Path(folder) / "train.jsonl", Path(folder) / "test.jsonl", Path(folder) / "databases")
    try:
        task.databases.mkdir(parents=True, exist_ok=True)
        for path, schemas, size in ((task.train, TRAIN, train), (task.test, TEST, test)):
            examples = _examples(schemas, task.databases, size, seed)
            path.write_text("".join(json.dumps(example) + "\n" for example in examples), encoding="utf-8")
    except (OSError, sqlite3.OperationalError) as err:
        raise DataError(f"{folder}: cannot write the demo task: {err}") from err
    return task


def prompt(schema: DatabaseSchema, question: str) -> str:
    """The text before the SQL: the schema and the question."""
    return f"Schema:\n{schema.compact()}\nQuestion: {question}\nSQL:\n"


def _examples(schemas: Sequence[DatabaseSchema], folder: Path, size: int, seed: int) -> list[dict[str, str]]:
    """`size` examples, shuffled: the databases take turns, and so do the templates of each."""
    streams = [_stream(schema, folder / f"{schema.db_id}.sqlite", seed) for schema in schemas]
    examples: list[dict[str, str]] = []
    while streams and len(examples) < size:
        for stream in list(streams):
            example = next(stream, None)
            if example is None:
                streams.remove(stream)
            else:
                examples.append(example)
    if len(examples) < size:
        most = f"{len(examples)} different queries on {len(schemas)} databases"
        raise ConfigError(f"the demo templates give {most}, not {size}; ask for fewer")
    del examples[size:]
    random.Random(f"{seed}:order").shuffle(examples)
    return examples


def _stream(schema: DatabaseSchema, path: Path, seed: int) -> Iterator[dict[str, str]]:
    """Examples of one database, each with another query, until the templates are used up.

    The database is written first.
    """
    rng = random.Random(
        f"{seed}:{schema.db_id}"
    )  # a text as seed: the same stream on every Python version and platform
    rows = _rows(schema, rng)
    _write(schema, rows, path)
    seen: set[str] = set()
    templates = list(TEMPLATES)
    with closing(sqlite3.connect(path)) as db:
        while templates:
            rng.shuffle(templates)
            for template in list(templates):
                drawn = (ask(template, schema, rows, rng) for _ in range(TRIES))
                found = next(
                    ((text, sql) for text, sql in drawn if sql not in seen and db.execute(sql).fetchone()), None
                )
                if found is None:
                    templates.remove(template)
                    continue
                seen.add(found[1])
                yield {
                    "db_id": schema.db_id,
                    "prompt": prompt(schema, found[0]),
                    "completion": found[1],
                    "query": found[1],
                }


def _rows(schema: DatabaseSchema, rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    sizes = {table.name: table.rows for table in schema.tables}
    return {table.name: _table_rows(table, sizes, rng) for table in schema.tables}


def _table_rows(table: Table, sizes: dict[str, int], rng: random.Random) -> list[dict[str, Any]]:
    columns: dict[str, Sequence[Any]] = {"id": range(1, table.rows + 1)}
    columns[table.label.name] = rng.sample([" ".join(words) for words in product(*table.label.words)], table.rows)
    for group in table.groups:
        columns[group.name] = rng.choices(group.values, weights=range(len(group.values), 0, -1), k=table.rows)
    for number in table.numbers:
        columns[number.name] = _amounts(number, table.rows, rng)
    for link in table.links:
        columns[link.name] = _parents(link, sizes, table.rows, rng)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _amounts(number: Number, count: int, rng: random.Random) -> list[int] | list[float]:
    drawn = rng.sample(range(number.low * 10**number.decimals, number.high * 10**number.decimals), count)
    return [value / 10**number.decimals for value in drawn] if number.decimals else drawn


def _parents(link: Link, sizes: dict[str, int], count: int, rng: random.Random) -> list[int]:
    """Ids of parents. A few parents stay without children, so that "without any" has something to find."""
    parents = rng.sample(range(1, sizes[link.parent] + 1), sizes[link.parent] - 3)
    return rng.choices(parents, k=count)


def _write(schema: DatabaseSchema, rows: Rows, path: Path) -> None:
    path.unlink(missing_ok=True)
    with closing(sqlite3.connect(path)) as db, db:
        for table in schema.tables:
            columns = ", ".join(f'"{name}" {kind}' for name, kind in table.columns())
            db.execute(f"CREATE TABLE {table.name} ({columns})")
            marks = ", ".join("?" for _ in table.columns())
            db.executemany(
                f"INSERT INTO {table.name} VALUES ({marks})", [tuple(row.values()) for row in rows[table.name]]
            )
