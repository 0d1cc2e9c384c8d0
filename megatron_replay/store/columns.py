"""The columns of a block: how each field of the record becomes unsigned integers of some bytes, and comes back.

A new column is a field of `SetRecord`, an entry in `columns` and the next `format.VERSION`. Its entry says `since` that
version, so stores written before it are read without it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store import codec
from megatron_replay.store.format import Schema
from megatron_replay.store.sample_sets import Array, SampleSets, check_structure, refuse

GOLD_APPENDED = 1
"""Bit 0 of a flag; the others are zero."""


class Range(NamedTuple):
    """The values that a column of floats may have."""

    low: float
    high: float
    problem: str
    """The error message's words for a value outside, in a sample that is refused."""
    slack: float = 0.0
    """A value outside by at most this is taken as the nearest one inside."""

    def holds(self, values: Array, slack: float = 0.0) -> Array:
        """[n] bool: true for values that are inside, or outside by at most `slack`."""
        inside: Array = (values >= self.low - slack) & (values <= self.high + slack)
        return inside


FINITE = Range(float(np.finfo(np.float32).min), float(np.finfo(np.float32).max), "is not finite")
PROBABILITY = Range(0.0, 1.0, "is not a probability", slack=1e-3)


class Column(NamedTuple):
    """One column; `num_positions` and `sizes` are the block's own, every other is the field of SampleSets so named."""

    name: str
    per: Literal["sample", "position", "id"]
    width: int
    """Bytes of each value."""
    kind: Literal["integer", "ascending", "flag", "float", "logit"] = "integer"
    """The kind of values.

    - ascending: strictly, within a sample (per position) or a set (per id).
    - float: IEEE, of the width.
    - logit: as the schema says.
    """
    range: Range | None = None
    since: int = 1
    """The format version that brought the column."""


@cache
def columns(schema: Schema) -> tuple[Column, ...]:
    """The columns of a block in file order.

    With codec `zd` an ascending value is stored as its difference to the one before, less 1. The first of a run is
    stored unchanged.
    """
    table = [
        Column("num_positions", "sample", 4),
        Column("positions", "position", 4, "ascending"),
        Column("sizes", "position", 2),
        Column("gold_slot", "position", 2),
        Column("gold_appended", "position", 1, "flag"),
        Column("ids", "id", schema.id_bytes, "ascending"),
        Column("lse", "position", 4, "float", FINITE),
        Column("outside_mass", "position", 2, "float", PROBABILITY),
        Column("logits", "id", 2, "logit"),
    ]
    return tuple(c for c in table if c.since <= schema.version and (c.kind != "logit" or schema.logits != "none"))


@cache
def record_columns(schema: Schema) -> tuple[Column, ...]:
    """The columns that hold a field of SampleSets."""
    return tuple(column for column in columns(schema) if column.name not in ("num_positions", "sizes"))


def pack(column: Column, values: Array, schema: Schema) -> Array:
    """Values [n] -> unsigned integers [n] of the column's width, as `codec` stores them.

    Raises StoreError for a logit that the schema's type cannot hold.
    """
    if column.kind == "logit":
        return codec.pack_logits(values, schema.logits)
    if column.kind == "flag":
        return values.astype(bool).astype(np.uint32) * GOLD_APPENDED
    if column.kind != "float":
        return values.astype(np.uint32)
    exact = values.astype(np.float32)
    if column.range:
        exact = exact.clip(column.range.low, column.range.high)
    return exact.astype(f"<f{column.width}").view(f"<u{column.width}")


def unpack(column: Column, bits: Array, schema: Schema) -> Array:
    """The inverse of `pack`, from integers of any type, in the type that the record declares."""
    if column.kind == "logit":
        return codec.unpack_logits(bits, schema.logits)
    if column.kind == "flag":
        return (bits & GOLD_APPENDED).astype(bool)
    if column.kind == "float":
        return bits.astype(f"<u{column.width}").view(f"<f{column.width}").astype(np.float32)
    return bits.astype(_type(column, schema))


def _type(column: Column, schema: Schema) -> Any:
    return np.uint32 if column.name == "ids" and schema.vocab_size > 1 << 31 else SampleSets.dtypes()[column.name]


def as_stored(sets: SampleSets, schema: Schema) -> SampleSets:
    """The sets as a reader will find them, in arrays of their own.

    They are rounded as the store rounds, and lack what it does not keep.
    """
    kept = {c.name: unpack(c, pack(c, getattr(sets, c.name), schema), schema) for c in record_columns(schema)}
    return SampleSets(offsets=sets.offsets.astype(np.int64), **kept)


def check(sets: SampleSets, schema: Schema, name: str) -> None:
    """Raise StoreError, naming the sample and the position, unless the sets can be stored and read back as they are."""
    check_structure(sets, schema.vocab_size, name)
    for column in record_columns(schema):
        values = getattr(sets, column.name)
        if column.range and values is not None:
            wrong = ~column.range.holds(values.astype(np.float32), column.range.slack)
            refuse(name, sets.positions, wrong, f"{column.name} {column.range.problem}")
    for column in record_columns(schema):
        if column.kind != "flag" and getattr(sets, column.name) is None:
            kind = f"{schema.logits} logits" if column.kind == "logit" else column.name
            raise StoreError(f"{name}: this store keeps {kind}, but the sample has none")


def check_ranges(sets: SampleSets, schema: Schema) -> None:
    """Raise ValueError where a stored float is not one that `check` lets in."""
    ranged = [(column.name, column.range) for column in record_columns(schema) if column.range]
    if not all(range.holds(getattr(sets, name)).all() for name, range in ranged):
        names = " or ".join(name.replace("_", " ") for name, _ in ranged)
        raise ValueError(f"{names} is not a number it can be")
