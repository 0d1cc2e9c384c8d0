"""The measures of `evaluate`: each takes an open session and gives numbers, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_replay.data.records import Record, read_records
from megatron_replay.errors import DataError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.parallel.inference import generate
from megatron_replay.parallel.mcore.model import squared_distance
from megatron_replay.runtime.session import Session
from megatron_replay.scoring import Sandbox, exact_match, execution_match, extract_sql, proportion

SQLITE = b"SQLite format 3\0"
"""The first bytes of an SQLite database file."""


def nl2sql(session: Session) -> dict[str, Any]:
    """Greedy SQL for every question: the fractions with the gold query's result, and with the gold query itself."""
    asked = session.config.evaluate
    records = list(read_records(asked.nl2sql, targets=False))[: asked.limit]
    gold = [_gold(record) for record in records]
    databases = [_database(record, Path(asked.databases)) for record in records]  # before the hours of generating
    prompts = [session.template.prompt(record.prompt) for record in records]
    with session.progress("nl2sql", len(prompts), "questions") as advance:
        answers = generate(
            session.model,
            prompts,
            max_new_tokens=asked.max_new_tokens,
            stop_ids=session.tokenizer.eos_ids,
            vocab_size=session.vocab_size,
            batch=asked.batch,
            progress=advance,
        )
    predicted = [extract_sql(session.tokenizer.decode(answer)) for answer in answers]
    right = _executed(session, databases, predicted, gold)
    exact = sum(exact_match(ours, theirs) for ours, theirs in zip(predicted, gold, strict=True))
    return {
        "execution": proportion(sum(right), len(right)),
        "exact": proportion(exact, len(gold)),
        "questions": len(gold),
        "examples": [
            {"gold": g, "predicted": p, "correct": r} for g, p, r in list(zip(gold, predicted, right, strict=True))[:5]
        ],
    }


def distance(session: Session) -> dict[str, Any]:
    """|theta - theta_0| / |theta_0| over all parameters, theta_0 the base model's."""
    moved, size = squared_distance(session.model, HFFolder(session.config.evaluate.base))
    return {"relative_l2": math.sqrt(moved / size)}


def _executed(session: Session, databases: Sequence[Path], predicted: Sequence[str], gold: Sequence[str]) -> list[bool]:
    """Run the queries on the main rank; the verdicts go to all."""
    verdicts: list[bool] = []
    if session.world.is_main:
        with Sandbox() as sandbox:
            for database, ours, theirs in zip(databases, predicted, gold, strict=True):
                verdicts.append(execution_match(database, ours, theirs, sandbox=sandbox).correct)
    return list(session.world.gather_objects(verdicts)[0])


def _gold(record: Record) -> str:
    query = record.extra.get("query")
    if query is None:
        query = next((m.content for m in record.messages if m.role == "assistant"), None)
    if not isinstance(query, str) or not isinstance(record.extra.get("db_id"), str):
        raise DataError(
            f"{record.where}: an nl2sql line needs the keys db_id and query (or a completion), and a prompt in any "
            "data format"
        )
    return query


def _database(record: Record, folder: Path) -> Path:
    """The database of a question. Raises DataError where it is missing, no database, or not in the folder."""
    name = f"{record.extra['db_id']}.sqlite"
    path = folder / name
    if Path(name).name != name:
        raise DataError(
            f"{record.where}: db_id {record.extra['db_id']!r} is no plain name; a database lies in evaluate.databases "
            "itself"
        )
    if not path.is_file():
        raise DataError(f"{record.where}: no database {path}; evaluate.databases is the folder of <db_id>.sqlite files")
    with path.open("rb") as file:
        if file.read(len(SQLITE)) not in (SQLITE, b""):  # a file of no bytes is a database of no tables
            raise DataError(f"{record.where}: {path} is no SQLite database; copy the file again")
    return path
