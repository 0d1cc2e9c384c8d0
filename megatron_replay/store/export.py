"""A store as one row per position, for other programs: JSON lines, or Parquet where pyarrow is there.

It is for exchange, not training.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_replay.errors import StoreError
from megatron_replay.store.columns import Column, record_columns
from megatron_replay.store.files import disk_errors
from megatron_replay.store.reader import CandidateStore

ROWS = 4096
"""Rows of one Parquet row group."""


def export(store: CandidateStore, target: str | Path) -> int:
    """Write every position of the store to `target` (.jsonl or .parquet); returns the number of rows.

    The file appears under its name only when it is whole. Raises StoreError for another suffix, a missing pyarrow, a
    disk that refuses, or damage.
    """
    path = Path(target)
    kinds = {".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in kinds:
        raise StoreError(f"{path}: export writes .jsonl or .parquet; name the file so")
    fresh = path.with_name(f".{path.name}.new")
    with disk_errors(path, "write"):
        try:
            num_rows = kinds[path.suffix](store, fresh)
            os.replace(fresh, path)
        finally:
            with suppress(OSError):  # the error that stopped it is the one to report
                fresh.unlink(missing_ok=True)
    return num_rows


def rows(store: CandidateStore) -> Iterator[dict[str, Any]]:
    """One dict per position.

    It has uid (hex), position, ids, gold (an id), lse, outside_mass, and logits where they are stored.
    """
    further = _further(store)
    for uid in store:
        sets = store[uid]
        gold, name = sets.gold().tolist(), uid.hex()
        for i, position in enumerate(sets.positions.tolist()):
            span = slice(int(sets.offsets[i]), int(sets.offsets[i + 1]))
            row = {"uid": name, "position": position, "ids": sets.ids[span].tolist(), "gold": gold[i]}
            for column in further:
                values = getattr(sets, column.name)
                row[column.name] = values[i].item() if column.per == "position" else values[span].tolist()
            yield row


def _further(store: CandidateStore) -> list[Column]:
    """The columns of floats, which are exported under their names."""
    return [column for column in record_columns(store.manifest.schema) if column.kind in ("float", "logit")]


def _jsonl(store: CandidateStore, path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows(store):
            file.write(json.dumps(row, allow_nan=False) + "\n")
            count += 1
    return count


def _parquet(store: CandidateStore, path: Path) -> int:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as err:
        raise StoreError(
            f"{path}: Parquet needs pyarrow, which is not installed; pip install pyarrow, or export to .jsonl"
        ) from err
    described = [
        ("uid", arrow.string()),
        ("position", arrow.int32()),
        ("ids", arrow.list_(arrow.uint32())),
        ("gold", arrow.uint32()),
    ]
    number = arrow.float32()
    described += [(c.name, number if c.per == "position" else arrow.list_(number)) for c in _further(store)]
    schema, group, count = arrow.schema(described), [], 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        for row in rows(store):
            group.append(row)
            count += 1
            if len(group) == ROWS:
                file.write_table(arrow.Table.from_pylist(group, schema))
                group = []
        file.write_table(arrow.Table.from_pylist(group, schema))
    return count
