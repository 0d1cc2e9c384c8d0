"""A segment file from its end (sealed: footer index) or from its beginning (unfinished: block after block)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_replay.candidates import CandidateRule
from megatron_replay.store import block as blocks
from megatron_replay.store.counts import RHO_EDGES, Stats
from megatron_replay.store.files import Buffer, Damage, disk_errors
from megatron_replay.store.format import (
    ALIGN,
    BLOCK_ROW,
    FOOTER_HEADER,
    FOOTER_MAGIC,
    SAMPLE_ROW,
    SEAL,
    SEAL_MAGIC,
    SIZE_ROW,
    UID_BYTES,
    aligned,
    block_at,
    check_of,
    seal_check,
    stated_check,
    unpack_header,
)
from megatron_replay.store.manifest import Manifest
from megatron_replay.store.sample_sets import MAX_SET, Array


@dataclass
class Index:
    """Offsets and counts of everything in a segment. B blocks, S samples."""

    blocks: Array
    """[B] BLOCK_ROW."""
    samples: Array
    """[S] SAMPLE_ROW, in file order."""
    stats: Stats

    @property
    def end(self) -> int:
        """First byte after the last block."""
        return int(self.blocks["offset"][-1] + self.blocks["bytes"][-1]) if len(self.blocks) else ALIGN

    def same(self, other: Index) -> bool:
        """True where both say the same, byte for byte."""
        return pack_footer(self) == pack_footer(other)

    def uids(self) -> list[bytes]:
        packed = self.samples["uid"].tobytes()
        return [packed[i : i + UID_BYTES] for i in range(0, len(packed), UID_BYTES)]


class Growing:
    """The index of a segment that is still being written (or walked through)."""

    def __init__(self, rule: CandidateRule) -> None:
        self.rule, self.end, self.stats = rule, ALIGN, Stats()
        self.rows: list[tuple[int, int, int, int, int]] = []
        self._samples: list[Array] = []

    def add(self, part: Buffer, block: blocks.SampleBlock) -> None:
        """Take in the next block: its bytes and its contents."""
        sample = np.zeros(len(block.uids), SAMPLE_ROW)
        sample["uid"] = np.frombuffer(b"".join(block.uids), np.uint8).reshape(-1, UID_BYTES)
        sample["block"], sample["positions"] = len(self.rows), block.num_positions
        self._samples.append(sample)
        self.rows.append((self.end, len(part), stated_check(part), len(block.uids), 0))
        self.stats.add(block, self.rule)
        self.end += len(part)

    def index(self) -> Index:
        return Index(
            np.array(self.rows, BLOCK_ROW), np.concatenate([np.zeros(0, SAMPLE_ROW), *self._samples]), self.stats
        )


def pack_footer(index: Index) -> bytes:
    stats = index.stats
    occurring = np.flatnonzero(stats.sizes)
    sizes = np.zeros(len(occurring), SIZE_ROW)
    sizes["size"], sizes["count"] = occurring, stats.sizes[occurring]
    fields = (
        len(sizes),
        len(stats.rho),
        0,
        len(index.blocks),
        stats.samples,
        stats.positions,
        stats.ids,
        stats.capped,
        stats.gold_appended,
    )
    parts = [
        FOOTER_HEADER.pack(FOOTER_MAGIC, *fields),
        index.blocks.tobytes(),
        index.samples.tobytes(),
        sizes.tobytes(),
        stats.rho.astype("<u8").tobytes(),
    ]
    footer = b"".join(parts)
    return footer + bytes(aligned(len(footer)) - len(footer))


def pack_seal(header: bytes, footer: bytes, offset: int) -> bytes:
    file_bytes = offset + len(footer) + ALIGN
    fields = SEAL.pack(
        SEAL_MAGIC, offset, len(footer), file_bytes, xxhash.xxh3_64_intdigest(header), xxhash.xxh3_64_intdigest(footer)
    )
    return seal_check(bytearray(fields + bytes(8)))


class Segment:
    """A segment file, memory-mapped, or read into memory with `copy`.

    The copy is for a file that another process may be cutting short meanwhile.
    """

    def __init__(self, path: Path, plan: Manifest, *, copy: bool = False) -> None:
        """Open the file. Raises StoreError where it cannot be opened; its contents are checked by what reads them."""
        self.path, self.rule, self.schema = path, plan.rule, plan.schema
        with disk_errors(path, "read"), path.open("rb") as file:
            self.bytes = os.fstat(file.fileno()).st_size
            whole = copy or not self.bytes  # nothing can be mapped of an empty file
            self.data: Any = file.read() if whole else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self.bytes = len(self.data)
        self.view = memoryview(self.data)

    def header(self) -> None:
        """Raise Damage unless the file begins as this store's segment of this name."""
        unpack_header(self.path, self.view, self.schema)

    def block(self, offset: int) -> tuple[memoryview, blocks.SampleBlock]:
        """(bytes, contents) of the block at `offset`, checksum verified. Raises Damage."""
        part = block_at(self.path, self.view[offset:], offset)
        return part, blocks.decode(self.path, part, offset, self.schema)

    def walk(self) -> Iterator[tuple[memoryview, blocks.SampleBlock]]:
        """(bytes, contents) of each block from the first on.

        Raises Damage where the next one is not whole, or does not begin.
        """
        self.header()
        offset = ALIGN
        while offset < self.bytes:
            part, block = self.block(offset)
            yield part, block
            offset += len(part)

    def scan(self) -> tuple[Growing, Damage | None]:
        """Index of all blocks up to the first that is not whole, and what is wrong there."""
        growing = Growing(self.rule)
        try:
            for part, block in self.walk():
                growing.add(part, block)
        except Damage as err:
            return growing, err
        return growing, None

    def seal(self) -> tuple[int, Index]:
        """(seal checksum, index) of a finished segment. Raises Damage where seal, footer or their lengths are wrong."""
        self.header()
        end = self.bytes - ALIGN
        seal = bytes(self.view[end:]) if end >= ALIGN else b""
        if not is_seal(seal):
            raise Damage(
                self.path, max(end, 0), "the segment has no valid seal: it is unfinished, cut short or damaged"
            )
        _, offset, size, file_bytes, header, footer_check = SEAL.unpack_from(seal)
        if file_bytes != self.bytes or offset < ALIGN or offset + size != end:
            raise Damage(self.path, end, f"the seal is of a file of {file_bytes} bytes, this one has {self.bytes}")
        if header != xxhash.xxh3_64_intdigest(self.view[:ALIGN]):
            raise Damage(self.path, end, "the seal belongs to another segment")
        footer = self.view[offset:end]
        if xxhash.xxh3_64_intdigest(footer) != footer_check:
            raise Damage(self.path, offset, "the footer does not match its checksum")
        return stated_check(seal), unpack_footer(self.path, footer, offset)


def is_seal(part: bytes) -> bool:
    return part[:8] == SEAL_MAGIC and len(part) == ALIGN and check_of(part) == stated_check(part)


def unpack_footer(path: Path, footer: memoryview, offset: int) -> Index:
    """The index of a footer whose checksum is right; its counts are still checked against its length. Raises Damage."""
    magic, num_sizes, num_rho, _, num_blocks, *numbers = (
        FOOTER_HEADER.unpack_from(footer) if len(footer) >= ALIGN else (b"",) * 10
    )
    if magic != FOOTER_MAGIC or num_rho != len(RHO_EDGES) - 1:
        raise Damage(path, offset, "no footer begins here")
    lengths = [
        num_blocks * BLOCK_ROW.itemsize,
        numbers[0] * SAMPLE_ROW.itemsize,
        num_sizes * SIZE_ROW.itemsize,
        num_rho * 8,
    ]
    if aligned(ALIGN + sum(lengths)) != len(footer):
        raise Damage(path, offset, "the footer's counts do not match its length")
    at = np.cumsum([ALIGN, *lengths])
    rows, samples, sizes, rho = (
        np.frombuffer(footer[a:b], kind)
        for a, b, kind in zip(
            at[:-1].tolist(), at[1:].tolist(), (BLOCK_ROW, SAMPLE_ROW, SIZE_ROW, np.dtype("<u8")), strict=True
        )
    )
    ends = np.cumsum(rows["bytes"], dtype=np.uint64) + np.uint64(ALIGN)
    if len(rows) and ((rows["offset"] != np.concatenate([[np.uint64(ALIGN)], ends[:-1]])).any() or ends[-1] != offset):
        raise Damage(path, offset, "the footer's blocks do not fill the file")
    if rows["samples"].sum(dtype=np.uint64) != numbers[0] or (sizes["size"] > MAX_SET).any():
        raise Damage(path, offset, "the footer's counts contradict each other")
    if (samples["block"] != np.repeat(np.arange(len(rows)), rows["samples"])).any():
        raise Damage(path, offset, "the footer's tables contradict each other")
    num_samples, positions, num_ids, capped, appended = numbers
    stats = Stats(num_samples, positions, num_ids, capped, appended, rho=rho.astype(np.int64))
    stats.sizes = np.zeros(int(sizes["size"].max(initial=1)) + 1, np.int64)
    stats.sizes[sizes["size"]] = sizes["count"]
    return Index(rows, samples, stats)
