"""Every byte of a segment file, written and checked here. Little-endian throughout.

A segment `segments/<writer>-<seq>.mrs` is a run of 64-byte-aligned parts without gaps:

    header  64 B   magic 8s "MRSEG\\r\\n\\x1a" | version u16 | codec u8 | logits u8 | writer u32 | seq u32 |
                   vocabulary u64 | zeros | xxh3-64 of the first 56 B
    block          block header, frame table, frames, zeros up to the next multiple of 64
      header 64 B  magic 4s "MRSB" | zeros u32 | bytes u64 | own file offset u64 | samples u32 | frames u32 |
                   positions u64 | ids u64 | zeros | xxh3-64 of the whole block without this field
      frame table  stored length u32 of each frame
      frames       uids 16 B each, then the columns of `columns.columns`; a column of w bytes is
                   one frame with codec `raw`: its integers, interleaved
                   w frames with `zd`: byte plane 0 .. w - 1, each by itself a zstd frame, or as it is where zstd does
                   not make it smaller
    footer         footer header 64 B: magic 4s "MRSF" | size bins u32 | rho bins u32 | zeros u32 | blocks u64 |
                   samples u64 | positions u64 | ids u64 | capped u64 | gold appended u64
                   block table:  offset u64 | bytes u64 | xxh3-64 u64 | samples u32 | zeros u32
                   sample table: uid 16 B | block u32 | positions u32
                   set sizes:    size u64 | count u64, for each size that occurs
                   rho:          count u64 of each bin; zeros up to the next multiple of 64
    seal    64 B   magic 8s "MRSSEAL\\x01" | footer offset u64 | footer bytes u64 | file bytes u64 |
                   xxh3-64 of the header's 64 B u64 | xxh3-64 of the footer u64 | zeros u64 | xxh3-64 of the first 56 B

A file without a seal is unfinished: its blocks are found one after the other, each saying how long it is and proving
itself. Byte planes one zstd frame each came out smaller than variable-length integers (9.7 against 10.0 bits an id) and
decode without a loop.

The version is that of the columns: a later one may have more of them. It stands in every segment's header and in the
manifest, and a store is read, repaired and verified with the columns of its own version.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xxhash

from megatron_replay.errors import StoreError
from megatron_replay.store.files import Buffer, Damage
from megatron_replay.store.sample_sets import MAX_IDS, MAX_POSITIONS, MAX_VOCAB

VERSION = 1
"""The version that is written."""
VERSIONS = range(1, VERSION + 1)
"""The versions that are read."""
ALIGN = 64
UID_BYTES = 16

Codec = Literal["raw", "zd"]
Logits = Literal["none", "fp16", "bf16"]
CODECS: tuple[Codec, ...] = get_args(Codec)
LOGITS: tuple[Logits, ...] = get_args(Logits)

SEGMENT_MAGIC, BLOCK_MAGIC, FOOTER_MAGIC, SEAL_MAGIC = b"MRSEG\r\n\x1a", b"MRSB", b"MRSF", b"MRSSEAL\x01"
SEGMENT_HEADER = struct.Struct("<8sHBBIIQ28x")
BLOCK_HEADER = struct.Struct("<4sIQQIIQQ8x")
FOOTER_HEADER = struct.Struct("<4sIIIQQQQQQ")
SEAL = struct.Struct("<8sQQQQQ8x")
CHECK = struct.Struct("<Q")

BLOCK_ROW = np.dtype([("offset", "<u8"), ("bytes", "<u8"), ("check", "<u8"), ("samples", "<u4"), ("zeros", "<u4")])
SAMPLE_ROW = np.dtype([("uid", "u1", (UID_BYTES,)), ("block", "<u4"), ("positions", "<u4")])
SIZE_ROW = np.dtype([("size", "<u8"), ("count", "<u8")])


@dataclass(frozen=True)
class Schema:
    """The settings that the bytes of every block depend on."""

    vocab_size: int
    codec: Codec = "zd"
    logits: Logits = "none"
    version: int = VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= MAX_VOCAB:
            raise StoreError(f"vocab_size must lie in 1..2^32, got {self.vocab_size}")
        if self.codec not in CODECS:
            raise StoreError(f"codec {self.codec!r} is not one of {', '.join(CODECS)}")
        if self.logits not in LOGITS:
            raise StoreError(f"logits {self.logits!r} is not one of {', '.join(LOGITS)}")

    @property
    def id_bytes(self) -> int:
        return 3 if self.vocab_size <= 1 << 24 else 4


@dataclass(frozen=True)
class BlockHeader:
    """Counts of one block, already checked against the file's size and the limits of the format."""

    bytes: int
    samples: int
    frames: int
    positions: int
    ids: int


def aligned(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // ALIGN) * ALIGN


def check_of(part: Buffer) -> int:
    """xxh3-64 of a part whose checksum stands in bytes 56..63, over everything but those."""
    view = memoryview(part)
    hasher = xxhash.xxh3_64(view[:56])
    hasher.update(view[ALIGN:])
    return int(hasher.intdigest())


def stated_check(part: Buffer) -> int:
    return int(CHECK.unpack_from(part, 56)[0])


def seal_check(part: bytearray) -> bytes:
    """The part with its checksum filled in."""
    CHECK.pack_into(part, 56, check_of(part))
    return bytes(part)


def pack_header(schema: Schema, writer: int, seq: int) -> bytes:
    codec, logits = CODECS.index(schema.codec), LOGITS.index(schema.logits)
    fields = SEGMENT_HEADER.pack(SEGMENT_MAGIC, schema.version, codec, logits, writer, seq, schema.vocab_size)
    return seal_check(bytearray(fields + bytes(8)))


def unpack_header(path: Path, data: Buffer, schema: Schema) -> None:
    """Raise Damage unless `data` begins with the header of a segment of this schema and of this file's name."""
    if len(data) < ALIGN:
        raise Damage(path, len(data), f"the file ends inside its {ALIGN}-byte header")
    magic, version = SEGMENT_HEADER.unpack_from(data)[:2]
    if magic != SEGMENT_MAGIC:
        raise Damage(path, 0, "not a segment of a candidate store")
    part = bytes(memoryview(data)[:ALIGN])
    if check_of(part) != stated_check(part):
        raise Damage(path, 0, "the header does not match its checksum")
    if version not in VERSIONS:
        raise StoreError(f"{path}: store format version {version}; this program reads version {VERSION}")
    writer, seq = parse_name(path)
    if part != pack_header(schema, writer, seq):
        raise Damage(path, 0, "the header belongs to another segment or another store")


def segment_name(writer: int, seq: int) -> str:
    return f"{writer:05d}-{seq:06d}.mrs"


def parse_name(path: Path) -> tuple[int, int]:
    """(writer, seq) of a segment's file name."""
    writer, _, seq = path.stem.partition("-")
    if (
        path.suffix != ".mrs"
        or not (writer.isdecimal() and seq.isdecimal())
        or path.name != segment_name(int(writer), int(seq))
    ):
        raise StoreError(f"{path}: not a segment's name; segments are named <writer>-<seq>.mrs, remove the file")
    return int(writer), int(seq)


def read_block_header(path: Path, rest: memoryview, offset: int) -> BlockHeader:
    """The header of the block at `offset`; `rest` is the file from there on.

    Nothing is allocated on its word, each length is checked first. Raises Damage where no block of this file can stand.
    """
    if len(rest) < ALIGN:
        raise Damage(path, offset, "the file ends inside a block header")
    magic, zeros, size, own, samples, frames, positions, ids = BLOCK_HEADER.unpack_from(rest)
    if magic != BLOCK_MAGIC or zeros or own != offset:
        raise Damage(path, offset, "no block begins here")
    if size % ALIGN or not ALIGN <= size <= len(rest):
        raise Damage(path, offset, f"a block of {size} bytes does not fit, the file has {len(rest)} left")
    least = ALIGN + frames * 4 + samples * UID_BYTES
    if least > size or positions > 2 * MAX_POSITIONS or ids > 2 * MAX_IDS or ids < positions:
        raise Damage(
            path, offset, f"a block cannot hold {samples} samples, {positions} positions, {ids} ids in {size} bytes"
        )
    return BlockHeader(size, samples, frames, positions, ids)


def block_at(path: Path, rest: memoryview, offset: int) -> memoryview:
    """The bytes of the block at `offset`, checksum verified; `rest` is the file from there on. Raises Damage."""
    part = rest[: read_block_header(path, rest, offset).bytes]
    if check_of(part) != stated_check(part):
        raise Damage(path, offset, f"the block ({len(part)} bytes) does not match its checksum")
    return part
