"""Files of questions as objects, whatever their format: csv with or without a header, jsonl, json, or a folder of them.

Published benchmarks come in all of these. Their keys are read by `choice_layouts` and `generation`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_replay.errors import DataError

SUFFIXES = (".csv", ".json", ".jsonl", ".txt")
SPLIT = re.compile(r"_(dev|val|validation|test|train)$")


class Item(NamedTuple):
    """One question as its file holds it."""

    where: str
    """file:line of csv and jsonl, file: key or number of json."""
    subject: str
    """The file's name in words, without the split: college_physics_dev.csv is "college physics"."""
    keys: dict[str, Any]


def read_items(path: Path) -> list[Item]:
    """The questions of a file, or of all such files of a folder in order of their names.

    Raises DataError for a file that is missing, of another format, broken or empty.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.name[0] != ".")
        if not files:
            raise DataError(f"{path}: no {', '.join(SUFFIXES)} file in this folder; give the folder of the questions")
        return [item for file in files for item in read_items(file)]
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: questions are read from {', '.join(SUFFIXES)}; convert the file, or name a folder")
    subject = SPLIT.sub("", path.stem).replace("_", " ")
    reader = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix, _json)
    items = [Item(where, subject, keys) for where, keys in reader(_text(path), path)]
    if not items:
        raise DataError(f"{path}: empty; expected at least one question")
    return items


def _csv(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """MMLU's files as published have no header: question, choices, and the letter of the answer."""
    rows = csv.reader(io.StringIO(text, newline=""))
    header: list[str] = []
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row:
                continue
            if not header and "question" in (cell.strip().lower() for cell in row):
                header = [cell.strip() for cell in row]
            elif header and len(row) != len(header):
                raise DataError(f"{where}: {len(row)} cells under {len(header)} heads; quote cells that hold commas")
            elif header:
                yield where, dict(zip(header, row, strict=True))
            else:
                yield where, {"question": row[0], "choices": row[1:-1], "answer": row[-1]}
    except csv.Error as err:
        raise DataError(f"{path}:{rows.line_num}: not valid csv: {err}") from err


def _jsonl(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines end with a line feed only: a string may hold Unicode's other line separators as they are."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}")


def _json(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A list of questions, an object of them (TeleQnA), or one with a list under `examples` (BIG-Bench Hard)."""
    tree = _parsed(text, str(path))
    tree = tree.get("examples", tree) if isinstance(tree, dict) else tree
    if not isinstance(tree, (dict, list)):
        raise DataError(f"{path}: expected a list or an object of questions, found {type(tree).__name__}")
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree, start=1):
        yield f"{path}: {name}", _object(value, f"{path}: {name}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where}: not valid JSON: {err}") from err


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a question's keys and values, found {type(value).__name__}")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(f"{path}: byte {err.start} is not UTF-8; save the file as UTF-8") from err
    except OSError as err:
        raise DataError(f"{path}: cannot read: {err.strerror}") from err
