"""Two results of `evaluate`, paired: which measures differ, by how much, and how surely."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.runtime.questions import Row, questions_path, read_rows
from megatron_replay.scoring.paired import Difference, compare_correct, compare_ratio
from megatron_replay.scoring.table import show_rows, shown

Rows = dict[tuple[str, str], Row]
HEADS = ("measure", "questions", "first", "second", "difference", "95 % interval", "p")


def run(first: str, second: str, *, as_json: bool) -> None:
    """Print second - first for each measure that both results have; questions that only one has are left out.

    Raises DataError where a file of questions is missing or broken, and where the two have no question in common.
    """
    ours, theirs = _rows(first), _rows(second)
    found = differences(ours, theirs)
    if not found:
        raise DataError(f"{first} and {second} have no question in common; evaluate both on the same files and keys")
    if as_json:
        print(json.dumps({name: its._asdict() for name, its in found.items()}, indent=1))
        return
    show_rows(f"{second} - {first}", HEADS, [_line(name, its) for name, its in found.items()])
    for path, own, other in ((first, ours, theirs), (second, theirs, ours)):
        if missing := len(own.keys() - other.keys()):
            print(f"{missing} of {len(own)} questions of {path} are not in the other result")


def differences(first: Rows, second: Rows) -> dict[str, Difference]:
    """{measure: difference} over the common questions: accuracies by McNemar's test, NLLs (.nll) by the bootstrap."""
    found: dict[str, Difference] = {}
    common = [key for key in first if key in second]
    for measure in dict.fromkeys(name for name, _ in common):
        pairs = [(first[key], second[key]) for key in common if key[0] == measure]
        if judged := [(a["correct"], b["correct"]) for a, b in pairs if "correct" in a and "correct" in b]:
            found[measure] = compare_correct([a for a, _ in judged], [b for _, b in judged])
        if likely := [(a["nll"], b["nll"], a.get("tokens", 1)) for a, b in pairs if "nll" in a and "nll" in b]:
            name = f"{measure}.nll" if measure in found else measure
            found[name] = compare_ratio(*([row[i] for row in likely] for i in range(3)))
    return found


def _rows(path: str) -> Rows:
    return read_rows(Path(path) if path.endswith(".jsonl") else questions_path(path))


def _line(name: str, its: Difference) -> tuple[str, ...]:
    numbers: list[Any] = [its.questions, its.first, its.second]
    interval = f"[{its.low:+.4g}, {its.high:+.4g}]"
    return (name, *map(shown, numbers), f"{its.difference:+.4g}", interval, f"{its.p:.2g}")
