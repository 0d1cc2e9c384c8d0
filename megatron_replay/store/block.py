"""A block: a few whole samples as columns. S samples, P positions and nnz ids over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_replay.store import codec
from megatron_replay.store.columns import check_ranges, columns, pack, record_columns, unpack
from megatron_replay.store.files import Damage
from megatron_replay.store.format import (
    ALIGN,
    BLOCK_HEADER,
    BLOCK_MAGIC,
    UID_BYTES,
    Schema,
    aligned,
    read_block_header,
    seal_check,
)
from megatron_replay.store.sample_sets import Array, SampleSets


@dataclass(frozen=True)
class SampleBlock:
    """A decoded block: the sets of all its samples, one after the other, as a reader will find them."""

    uids: list[bytes]
    num_positions: Array
    """[S] int64."""
    sets: SampleSets
    """The sets of P positions; `positions` begin anew with each sample."""

    @cached_property
    def sample_starts(self) -> Array:
        """[S + 1] int64: first position of each sample."""
        return starts_of(self.num_positions)

    def sample(self, index: int) -> SampleSets:
        """Sample `index` of the block, in arrays of its own."""
        return self.sets.rows(int(self.sample_starts[index]), int(self.sample_starts[index + 1])).map(np.copy)


class Runs(NamedTuple):
    """Ascending runs of a column: the index of each one's first value, and its length; none is empty."""

    starts: Array
    sizes: Array


def starts_of(sizes: Array) -> Array:
    """[n] lengths -> [n + 1] int64 offsets."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def join(samples: Sequence[tuple[bytes, SampleSets]]) -> SampleBlock:
    """Samples, already checked and `as_stored`, as one block."""
    return SampleBlock(
        uids=[uid for uid, _ in samples],
        num_positions=np.array([sets.num_positions for _, sets in samples], np.int64),
        sets=SampleSets.cat([sets for _, sets in samples]),
    )


def encode(block: SampleBlock, schema: Schema, offset: int) -> bytes:
    """The bytes of the block at `offset` of its file; a function of its content alone."""
    sizes = block.sets.sizes()
    runs = _runs(block.num_positions, sizes, block.sets.offsets)
    values = {**block.sets.columns(), "num_positions": block.num_positions, "sizes": sizes}
    frames = [b"".join(block.uids)]
    for column in columns(schema):
        bits = pack(column, values[column.name], schema)
        if column.kind == "ascending" and schema.codec == "zd":
            bits = codec.to_steps(bits, runs[column.per].starts)
        frames += codec.encode(bits, column.width, schema.codec)
    table = np.array([len(f) for f in frames], "<u4").tobytes()
    size = ALIGN + len(table) + sum(map(len, frames))
    num_positions, num_ids = len(sizes), len(block.sets.ids)
    header = BLOCK_HEADER.pack(
        BLOCK_MAGIC, 0, aligned(size), offset, len(block.uids), len(frames), num_positions, num_ids
    )
    return seal_check(bytearray(b"".join([header, bytes(8), table, *frames, bytes(aligned(size) - size)])))


def decode(path: Path, data: memoryview, offset: int, schema: Schema) -> SampleBlock:
    """The block whose checksum-verified bytes are `data`, its contents checked against the schema. Raises Damage."""
    try:
        return _decode(path, data, offset, schema)
    except ValueError as err:
        raise Damage(path, offset, f"the block's contents are wrong: {err}") from err


def _decode(path: Path, data: memoryview, offset: int, schema: Schema) -> SampleBlock:
    header = read_block_header(path, data, offset)
    uids, *frames = _frames(data, header.frames, schema)
    counts = {"sample": header.samples, "position": header.positions, "id": header.ids}
    if len(uids) != header.samples * UID_BYTES:
        raise ValueError("uids are missing")
    packed = bytes(uids)
    bits: dict[str, Array] = {}
    for column in columns(schema):
        num = codec.num_frames(column.width, schema.codec)
        bits[column.name] = codec.decode(frames[:num], counts[column.per], column.width, schema.codec)
        del frames[:num]
    num_positions, sizes = (bits[name].astype(np.int64) for name in ("num_positions", "sizes"))
    _sums(num_positions, sizes, header.positions, header.ids)
    offsets = starts_of(sizes)
    runs, limits = _runs(num_positions, sizes, offsets), {"position": 1 << 31, "id": schema.vocab_size}
    for column in columns(schema):
        if column.kind == "ascending":
            run, limit = runs[column.per], limits[column.per]
            bits[column.name] = _ascending(bits[column.name], run, limit, schema, column.per)
    sets = SampleSets(offsets=offsets, **{c.name: unpack(c, bits[c.name], schema) for c in record_columns(schema)})
    if (sets.gold_slot >= sizes).any():
        raise ValueError("a gold slot lies outside its set")
    check_ranges(sets, schema)
    return SampleBlock([packed[i : i + UID_BYTES] for i in range(0, len(packed), UID_BYTES)], num_positions, sets)


def _runs(num_positions: Array, sizes: Array, offsets: Array) -> dict[str, Runs]:
    """The runs of a column per position, which are the samples, and per id, which are the sets."""
    occupied = num_positions > 0
    samples = Runs(starts_of(num_positions)[:-1][occupied], num_positions[occupied])
    return {"position": samples, "id": Runs(offsets[:-1], sizes)}


def _frames(data: memoryview, count: int, schema: Schema) -> list[memoryview]:
    expected = 1 + sum(codec.num_frames(c.width, schema.codec) for c in columns(schema))
    if count != expected:
        raise ValueError(f"{count} frames where {expected} belong")
    lengths = np.frombuffer(data[ALIGN : ALIGN + 4 * count], "<u4").astype(np.int64)
    ends = ALIGN + 4 * count + np.cumsum(lengths)
    if aligned(int(ends[-1])) != len(data):
        raise ValueError("the frames do not fill the block")
    return [data[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]


def _sums(num_positions: Array, sizes: Array, positions: int, ids: int) -> None:
    if num_positions.sum() != positions or sizes.sum() != ids or (sizes < 1).any():
        raise ValueError("set sizes or position counts do not add up")


def _ascending(values: Array, runs: Runs, limit: int, schema: Schema, what: str) -> Array:
    """Runs of strictly ascending integers below `limit`, as int64, or ValueError."""
    if schema.codec == "zd":
        whole = codec.from_steps(values, *runs)
    else:
        whole = values.astype(np.int64)
        step = np.diff(whole, prepend=-1)
        step[runs.starts] = 1
        if (step <= 0).any():
            raise ValueError(f"a run of {what}s is not ascending")
    if len(whole) and whole.max() >= limit:
        raise ValueError(f"{what} {whole.max()} is not below {limit}")
    return whole
