"""The journal: up to which byte each segment is known to be on the disk, one JSON line after each fsync.

While a store grows every writer has a file of its own (`journal-<writer>.jsonl`); `finish` leaves one `journal.jsonl`.
Bytes after the last line of a segment may be torn by a kill and are cut off on resuming. Bytes before it were durable,
so anything wrong there is damage and is reported as damage.
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash

from megatron_replay.errors import StoreError
from megatron_replay.store.files import disk_errors
from megatron_replay.store.segment import Index

GROUP = 64
"""Blocks between two fsyncs."""


def path_of(root: Path, writer: int) -> Path:
    return root / f"journal-{writer:05d}.jsonl"


def line(segment: str, size: int, blocks: int, samples: int, *, sealed: bool) -> bytes:
    """One line: the first `size` bytes of the segment, that many blocks and samples, are durable."""
    text = json.dumps({"segment": segment, "bytes": size, "blocks": blocks, "samples": samples, "sealed": sealed})
    return f'{text[:-1]}, "checksum": "{xxhash.xxh3_64_hexdigest(text.encode())}"}}\n'.encode()


def lines(segment: str, size: int, index: Index, *, sealed: bool) -> bytes:
    """The lines an undisturbed writer leaves for a segment of `size` bytes."""
    ends = (index.blocks["offset"] + index.blocks["bytes"]).tolist()
    samples = index.blocks["samples"].cumsum().tolist()
    text = [line(segment, ends[i - 1], i, samples[i - 1], sealed=False) for i in range(GROUP, len(ends) + 1, GROUP)]
    if sealed:
        text.append(line(segment, size, len(ends), samples[-1] if samples else 0, sealed=True))
    return b"".join(text)


def durable(path: Path) -> dict[str, int]:
    """Segment name -> bytes known to be on the disk. A line that is torn or not as written counts for nothing."""
    if not path.exists():
        return {}
    with disk_errors(path, "read"):
        text = path.read_bytes()
    marks: dict[str, int] = {}
    for each in text.splitlines(keepends=True):
        try:
            fields = json.loads(each)
            whole = (
                line(fields["segment"], fields["bytes"], fields["blocks"], fields["samples"], sealed=fields["sealed"])
                == each
            )
        except (ValueError, KeyError, TypeError):
            continue
        if whole:
            marks[fields["segment"]] = max(fields["bytes"], marks.get(fields["segment"], 0))
    return marks


def expected(segments: list[tuple[str, int, Index]]) -> bytes:
    """The whole `journal.jsonl` of a complete store: (name, bytes, index) of its segments by name."""
    names = [name for name, _, _ in segments]
    if names != sorted(set(names)):
        raise StoreError(f"segments are listed out of order or twice: {', '.join(names)}")
    return b"".join(lines(name, size, index, sealed=True) for name, size, index in segments)
