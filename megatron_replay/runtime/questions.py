"""The questions of a run one by one: `evaluate` writes them beside its result, and `compare` pairs those of two runs.

A row holds:

- `measure`: the dotted name of the measure, such as `text.wikitext`.
- `question`: an id of what was asked, the same in every run that asks it.
- `correct` (bool), or `nll` (nats, summed) with `tokens` (how many), or both.
- more that helps a reader, such as `prompt` and `answer`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError

Row = dict[str, Any]


def question_id(asked: str | bytes) -> str:
    """The first 16 hex digits of the sha256 of what was asked."""
    return hashlib.sha256(asked.encode() if isinstance(asked, str) else asked).hexdigest()[:16]


def take_rows(result: dict[str, Any], measure: str = "") -> list[Row]:
    """Take the lists named `rows` out of a nested result.

    Each row gets the name of its measure, to which a `measure` of its own is added. A question that is asked again in
    the same measure gets "#2" and so on, so that the two stay apart.
    """
    rows = [_named(row, measure) for row in result.pop("rows", [])]
    seen: Counter[tuple[str, str]] = Counter()
    for row in rows:
        key = (row["measure"], row["question"])
        seen[key] += 1
        if seen[key] > 1:
            row["question"] += f"#{seen[key]}"
    for name, inner in result.items():
        if isinstance(inner, dict):
            rows += take_rows(inner, f"{measure}.{name}" if measure else name)
    return rows


def _named(row: Row, measure: str) -> Row:
    return {**row, "measure": ".".join(part for part in (measure, row.get("measure", "")) if part)}


def questions_path(output: str | Path) -> Path:
    """Where the questions of a result lie: result.json has result.questions.jsonl beside it."""
    return Path(output).with_suffix(".questions.jsonl")


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """{(measure, question): row} of a file of questions. Raises DataError where it is missing or something else."""
    rows: dict[tuple[str, str], Row] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: cannot be read: {err}; `evaluate` with evaluate.output writes it") from err
    for number, line in enumerate(lines, start=1):
        if line.strip():
            key, row = _parsed(line, f"{path}:{number}")
            if key in rows:
                raise DataError(f"{path}:{number}: {key[0]} asks question {key[1]} twice; write the file again")
            rows[key] = row
    return rows


def _parsed(line: str, where: str) -> tuple[tuple[str, str], Row]:
    try:
        row = json.loads(line)
        key = (str(row["measure"]), str(row["question"]))
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{where}: a question is {{measure, question, correct or nll}}; {type(err).__name__}: {err}"
        ) from err
    if not isinstance(row.get("correct", True), bool) or not _is_number(row.get("nll", 0.0)):
        raise DataError(f"{where}: correct is true or false and nll a number; write the file again")
    if not _is_number(row.get("tokens", 1)) or row.get("tokens", 1) <= 0:
        raise DataError(f"{where}: tokens={row['tokens']!r} is no number above 0; write the file again")
    return key, row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def lines(rows: Sequence[Row]) -> str:
    """The rows as jsonl, measure and question first."""
    ordered = ({"measure": row["measure"], "question": row["question"], **row} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
