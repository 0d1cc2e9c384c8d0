"""A block: a few whole samples as columns. S samples, P positions and nnz ids over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from megatron_replay.store import codec
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
from megatron_replay.store.sets import Array, SampleSets

GOLD_APPENDED = 1


class Column(NamedTuple):
    name: str
    per: Literal["sample", "position", "id"]
    width: int


def columns(schema: Schema) -> list[Column]:
    """The columns of a block in file order (the table in `format`)."""
    table = [
        Column("num_positions", "sample", 4),
        Column("positions", "position", 4),
        Column("sizes", "position", 2),
        Column("gold_slot", "position", 2),
        Column("flags", "position", 1),
        Column("ids", "id", schema.id_bytes),
        Column("lse", "position", 4),
        Column("outside_mass", "position", 2),
    ]
    return table if schema.logits == "none" else [*table, Column("logits", "id", 2)]


@dataclass(frozen=True)
class Block:
    """A decoded block; arrays as in SampleSets, over all its samples."""

    uids: list[bytes]
    num_positions: Array
    """[S] int64."""
    positions: Array
    sizes: Array
    """[P] int64."""
    gold_slot: Array
    flags: Array
    ids: Array
    lse: Array
    outside_mass: Array
    logits: Array | None
    sample_starts: Array
    """[S + 1] int64: first position of each sample."""
    offsets: Array
    """[P + 1] int64: first id of each position."""

    def sample(self, index: int) -> SampleSets:
        """Sample `index` of the block, in arrays of its own."""
        a, b = int(self.sample_starts[index]), int(self.sample_starts[index + 1])
        lo, hi = int(self.offsets[a]), int(self.offsets[b])
        return SampleSets(
            positions=self.positions[a:b].copy(),
            offsets=self.offsets[a : b + 1] - lo,
            ids=self.ids[lo:hi].copy(),
            gold_slot=self.gold_slot[a:b].copy(),
            lse=self.lse[a:b].copy(),
            outside_mass=self.outside_mass[a:b].copy(),
            logits=None if self.logits is None else self.logits[lo:hi].copy(),
            gold_appended=(self.flags[a:b] & GOLD_APPENDED).astype(bool),
        )


def starts_of(sizes: Array) -> Array:
    """[n] lengths -> [n + 1] int64 offsets."""
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def join(samples: Sequence[tuple[bytes, SampleSets]], schema: Schema) -> Block:
    """Samples, already checked, as one block: with the values that will be read back (float16 mass, rounded logits)."""
    sets = [s for _, s in samples]
    sizes = np.concatenate([s.sizes() for s in sets])
    num_positions = np.array([s.num_positions for s in sets], np.int64)
    flags = [np.zeros(s.num_positions, bool) if s.gold_appended is None else s.gold_appended for s in sets]
    logits = None
    if schema.logits != "none":
        bits = codec.pack_logits(np.concatenate([s.logits for s in sets if s.logits is not None]), schema.logits)
        logits = codec.unpack_logits(bits, schema.logits)
    mass = np.concatenate([s.outside_mass for s in sets]).astype(np.float32).clip(0, 1)
    return Block(
        uids=[uid for uid, _ in samples],
        num_positions=num_positions,
        positions=np.concatenate([s.positions for s in sets]).astype(np.int32),
        sizes=sizes.astype(np.int64),
        gold_slot=np.concatenate([s.gold_slot for s in sets]).astype(np.int32),
        flags=np.concatenate(flags).astype(np.uint8) * GOLD_APPENDED,
        ids=np.concatenate([s.ids for s in sets]).astype(_id_type(schema)),
        lse=np.concatenate([s.lse for s in sets]).astype(np.float32),
        outside_mass=mass.astype("<f2").astype(np.float32),
        logits=logits,
        sample_starts=starts_of(num_positions),
        offsets=starts_of(sizes),
    )


def encode(block: Block, schema: Schema, offset: int) -> bytes:
    """The bytes of the block as it stands at `offset` of its file; a function of its content alone."""
    values = {
        "num_positions": block.num_positions,
        "positions": block.positions,
        "sizes": block.sizes,
        "gold_slot": block.gold_slot,
        "flags": block.flags,
        "ids": block.ids,
        "lse": block.lse.astype("<f4").view("<u4"),
        "outside_mass": block.outside_mass.astype("<f2").view("<u2"),
    }
    if block.logits is not None:
        values["logits"] = codec.pack_logits(block.logits, schema.logits)
    if schema.codec == "zd":
        occupied = block.sample_starts[:-1][block.num_positions > 0]
        values["positions"] = codec.to_steps(block.positions, occupied)
        values["ids"] = codec.to_steps(block.ids, block.offsets[:-1])
    frames = [b"".join(block.uids)]
    for column in columns(schema):
        frames += codec.encode(values[column.name], column.width, schema.codec)
    table = np.array([len(f) for f in frames], "<u4").tobytes()
    size = ALIGN + len(table) + sum(map(len, frames))
    header = BLOCK_HEADER.pack(
        BLOCK_MAGIC, 0, aligned(size), offset, len(block.uids), len(frames), len(block.positions), len(block.ids)
    )
    return seal_check(bytearray(b"".join([header, bytes(8), table, *frames, bytes(aligned(size) - size)])))


def decode(path: Path, data: memoryview, offset: int, schema: Schema) -> Block:
    """The block whose checksum-verified bytes are `data`, its contents checked against the schema. Raises Damage."""
    try:
        return _decode(path, data, offset, schema)
    except ValueError as err:
        raise Damage(path, offset, f"the block's contents are wrong: {err}") from err


def _decode(path: Path, data: memoryview, offset: int, schema: Schema) -> Block:
    header = read_block_header(path, data, offset)
    frames = _frames(data, header.frames, schema)
    counts = {"sample": header.samples, "position": header.positions, "id": header.ids}
    if len(frames[0]) != header.samples * UID_BYTES:
        raise ValueError("uids are missing")
    packed = bytes(frames[0])
    uids = [packed[i : i + UID_BYTES] for i in range(0, len(packed), UID_BYTES)]
    value: dict[str, Array] = {}
    at = 1
    for column in columns(schema):
        num = codec.num_frames(column.width, schema.codec)
        value[column.name] = codec.decode(frames[at : at + num], counts[column.per], column.width, schema.codec)
        at += num
    num_positions, sizes = value["num_positions"].astype(np.int64), value["sizes"].astype(np.int64)
    _sums(num_positions, sizes, header.positions, header.ids)
    sample_starts, offsets = starts_of(num_positions), starts_of(sizes)
    occupied = num_positions > 0
    positions = _ascending(
        value["positions"], sample_starts[:-1][occupied], num_positions[occupied], 1 << 31, schema, "position"
    )
    ids = _ascending(value["ids"], offsets[:-1], sizes, schema.vocab_size, schema, "id")
    gold_slot = value["gold_slot"].astype(np.int32)
    if (gold_slot >= sizes).any():
        raise ValueError("a gold slot lies outside its set")
    lse, mass = (
        value["lse"].view("<f4").astype(np.float32),
        value["outside_mass"].astype("<u2").view("<f2").astype(np.float32),
    )
    if not (np.isfinite(lse).all() and ((mass >= 0) & (mass <= 1)).all()):
        raise ValueError("lse or outside mass is not a number it can be")
    return Block(
        uids=uids,
        num_positions=num_positions,
        positions=positions.astype(np.int32),
        sizes=sizes,
        gold_slot=gold_slot,
        flags=value["flags"].astype(np.uint8),
        ids=ids.astype(_id_type(schema)),
        lse=lse,
        outside_mass=mass,
        logits=codec.unpack_logits(value["logits"], schema.logits) if "logits" in value else None,
        sample_starts=sample_starts,
        offsets=offsets,
    )


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


def _ascending(values: Array, starts: Array, sizes: Array, limit: int, schema: Schema, what: str) -> Array:
    """Runs of strictly ascending integers below `limit`, as int64, or ValueError."""
    if schema.codec == "zd":
        whole = codec.from_steps(values, starts, sizes)
    else:
        whole = values.astype(np.int64)
        step = np.diff(whole, prepend=-1)
        step[starts] = 1
        if (step <= 0).any():
            raise ValueError(f"a run of {what}s is not ascending")
    if len(whole) and whole.max() >= limit:
        raise ValueError(f"{what} {whole.max()} is not below {limit}")
    return whole


def _id_type(schema: Schema) -> type[np.int32] | type[np.uint32]:
    return np.int32 if schema.vocab_size <= 1 << 31 else np.uint32
