"""A store as one row per position, for other programs: JSON lines, or Parquet where pyarrow is there. For exchange, not
training."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_replay.errors import StoreError
from megatron_replay.store.files import told
from megatron_replay.store.reader import CandidateStore

ROWS = 4096
"""Rows of one Parquet row group."""


def export(store: CandidateStore, target: str | Path) -> int:
    """Write every position of the store to `target` (.jsonl or .parquet); returns the number of rows.

    The file appears under its name only when it is whole.
    Raises StoreError for another suffix, a missing pyarrow, a disk that refuses, or damage.
    """
    path = Path(target)
    kinds = {".jsonl": _jsonl, ".parquet": _parquet}
    if path.suffix not in kinds:
        raise StoreError(f"{path}: export writes .jsonl or .parquet; name the file so")
    fresh = path.with_name(f".{path.name}.new")
    with told(path, "write"):
        try:
            num_rows = kinds[path.suffix](store, fresh)
            os.replace(fresh, path)
        finally:
            with suppress(OSError):  # what stopped it is told
                fresh.unlink(missing_ok=True)
    return num_rows


def rows(store: CandidateStore) -> Iterator[dict[str, Any]]:
    """uid (hex), position, ids, gold (an id), lse, outside_mass, and logits where they are stored; one dict per
    position."""
    for uid in store:
        sets = store[uid]
        gold, name = sets.gold().tolist(), uid.hex()
        for i, position in enumerate(sets.positions.tolist()):
            span = slice(int(sets.offsets[i]), int(sets.offsets[i + 1]))
            row = {"uid": name, "position": position, "ids": sets.ids[span].tolist(), "gold": gold[i]}
            row |= {"lse": float(sets.lse[i]), "outside_mass": float(sets.outside_mass[i])}
            if sets.logits is not None:
                row["logits"] = sets.logits[span].tolist()
            yield row


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
    fields = [
        ("uid", arrow.string()),
        ("position", arrow.int32()),
        ("ids", arrow.list_(arrow.uint32())),
        ("gold", arrow.uint32()),
    ]
    fields += [("lse", arrow.float32()), ("outside_mass", arrow.float32())]
    if store.manifest.logits != "none":
        fields.append(("logits", arrow.list_(arrow.float32())))
    schema, group, count = arrow.schema(fields), [], 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as file:
        for row in rows(store):
            group.append(row)
            count += 1
            if len(group) == ROWS:
                file.write_table(arrow.Table.from_pylist(group, schema))
                group = []
        file.write_table(arrow.Table.from_pylist(group, schema))
    return count
