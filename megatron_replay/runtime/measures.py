"""The measures of `evaluate`: each takes an open session and gives numbers, the same on every rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay.data.records import Message, Record, read_records
from megatron_replay.errors import DataError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.parallel.inference import generate
from megatron_replay.parallel.mcore.model import squared_distance
from megatron_replay.runtime.likelihood import sequence_nll
from megatron_replay.runtime.session import Session
from megatron_replay.scoring import Sandbox, exact_match, execution_match, extract_sql, proportion, score_choices

SQLITE = b"SQLite format 3\0"
"""The first bytes of an SQLite database file."""


def multiple_choice(session: Session) -> dict[str, Any]:
    """Accuracy of the likeliest choice: lines of {"question", "choices", "answer": index}."""
    asked = session.config.evaluate
    questions = list(_choices(Path(asked.choice)))[: asked.limit]
    if not questions:
        raise DataError(f"{asked.choice}: empty; expected lines of {{question, choices, answer}}")
    sequences, positions = [], []
    for question, choices, _ in questions:
        prompt = session.template.prompt([Message("user", question)])
        for choice in choices:
            answer = session.tokenizer.encode(choice, continues=True)
            sequences.append(np.asarray([*prompt, *answer]))
            positions.append(np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1))
    nll = iter(sequence_nll(session, sequences, positions, "choice"))
    rows = [[next(nll) for _ in choices] for _, choices, _ in questions]
    return dict(
        score_choices(
            [[float(part.sum()) for part in row] for row in rows],
            [[len(part) for part in row] for row in rows],
            [a for _, _, a in questions],
        )
    )


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


def _choices(path: Path) -> Iterator[tuple[str, list[str], int]]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            question, choices, answer = item["question"], item["choices"], item["answer"]
        except (ValueError, KeyError, TypeError) as err:
            raise DataError(
                f"{path}:{number}: a multiple-choice line is {{question, choices, answer}}; {type(err).__name__}: {err}"
            ) from err
        if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(f"{path}:{number}: answer {answer!r} is not the index of one of the {len(choices)} choices")
        yield str(question), [str(c) for c in choices], answer


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise DataError(f"{path}: byte {err.start} is not UTF-8; save the file as UTF-8") from err
    except OSError as err:
        raise DataError(f"{path}: cannot read: {err.strerror}") from err
