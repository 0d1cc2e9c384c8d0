"""Questions for a database: the records of `evaluate.nl2sql`, each with its gold query and its SQLite files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.config import Evaluate
from megatron_replay.data.records import Message, Record, read_records
from megatron_replay.errors import DataError
from megatron_replay.runtime.questions import question_id
from megatron_replay.scoring import hardness

SQLITE = b"SQLite format 3\0"
"""The first bytes of an SQLite database file."""
OWN_IDS = ("uid", "question_id", "id")
"""Keys under which a data set may name its questions."""
LEVEL_KEYS = ("hardness", "difficulty")
"""Keys in which a data set names the level of a question."""


@dataclass(frozen=True)
class SqlQuestion:
    index: int
    uid: str
    where: str
    db_id: str
    prompt: tuple[Message, ...]
    gold: str
    level: str
    databases: tuple[Path, ...]
    """A test suite where there are several: a right query is right on each."""

    @property
    def asked(self) -> str:
        """The last turn of the prompt."""
        return self.prompt[-1].content


def read_sql_questions(asked: Evaluate) -> list[SqlQuestion]:
    """The questions in order, at most `limit`. Raises DataError, naming file and line, for one that cannot be asked."""
    records = list(read_records(asked.nl2sql, targets=False))[: asked.limit]
    known: dict[str, tuple[Path, ...]] = {}
    return [_question(index, record, Path(asked.databases), known) for index, record in enumerate(records)]


def _question(index: int, record: Record, folder: Path, known: dict[str, tuple[Path, ...]]) -> SqlQuestion:
    query = record.extra.get("query")
    if query is None:
        query = next((m.content for m in record.messages if m.role == "assistant"), None)
    db_id = record.extra.get("db_id")
    if not isinstance(query, str) or not isinstance(db_id, str) or not record.prompt:
        raise DataError(
            f"{record.where}: an nl2sql line needs the keys db_id and query (or a completion), and a prompt in any "
            "data format"
        )
    if db_id not in known:
        known[db_id] = _databases(record.where, db_id, folder)
    level = next((record.extra[key] for key in LEVEL_KEYS if isinstance(record.extra.get(key), str)), None)
    return SqlQuestion(
        index=index,
        uid=_uid(record.extra) or question_id("\0".join((db_id, *(turn.content for turn in record.prompt), query))),
        where=record.where,
        db_id=db_id,
        prompt=record.prompt,
        gold=query,
        level=level or hardness(query),
        databases=known[db_id],
    )


def _uid(extra: Mapping[str, Any]) -> str:
    """The id that a record has among its other keys; empty where it has none."""
    return str(next((extra[key] for key in OWN_IDS if isinstance(extra.get(key), (str, int))), ""))


def _databases(where: str, db_id: str, folder: Path) -> tuple[Path, ...]:
    """The databases of a question. Raises DataError where one is missing, no database, or not in the folder."""
    if Path(db_id).name != db_id or db_id in ("", ".."):
        raise DataError(
            f"{where}: db_id {db_id!r} is no plain name; a database lies in evaluate.databases itself, or in a folder "
            "of its name there"
        )
    found = find_databases(folder, db_id)
    if not found:
        raise DataError(
            f"{where}: no database {folder / db_id}.sqlite; evaluate.databases is the folder of <db_id>.sqlite files, "
            "or of folders <db_id> with .sqlite files"
        )
    for path in found:
        if not _is_sqlite(path):
            raise DataError(f"{where}: {path} is no SQLite database; copy the file again")
    return found


def find_databases(folder: Path, db_id: str) -> tuple[Path, ...]:
    """The file <db_id>.sqlite, or else every .sqlite file of the folder <db_id>, that of the same name first."""
    flat = folder / f"{db_id}.sqlite"
    if flat.is_file():
        return (flat,)
    return tuple(sorted((folder / db_id).glob("*.sqlite"), key=lambda path: (path.stem != db_id, path.name)))


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(SQLITE)) in (SQLITE, b"")  # a file of no bytes is a database of no tables
