"""The end of a collection: every segment sealed, everything counted, the manifest in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store import journal
from megatron_replay.store.counts import Stats
from megatron_replay.store.files import Damage, Disk, disk_errors
from megatron_replay.store.format import UID_BYTES, parse_name
from megatron_replay.store.manifest import JOURNAL, MANIFEST, SEGMENTS, Manifest, agree, pack
from megatron_replay.store.sample_sets import Array
from megatron_replay.store.segment import Index, Segment
from megatron_replay.store.writer import Writer


def finish(path: str | Path, manifest: Manifest, disk: Disk | None = None) -> Manifest:
    """Make the store complete; returns the manifest as written.

    It is called by one rank after all writers closed. Segments that a writer of an earlier run left open are sealed. It
    may be repeated; a kill at any point leaves an unfinished store or a complete one.

    Raises StoreError: other settings than the store was begun with, damage, a sample stored twice, or a writer still at
    work.
    """
    root, disk = Path(path), disk or Disk()
    plan = agree(root, manifest)
    _seal_orphans(root, plan, disk)
    entries, table, stats = [], [], Stats()
    for file in segment_files(root):
        segment = Segment(file, plan)
        check, index = segment.seal()
        entries.append(
            {"name": file.name, "bytes": segment.bytes, "check": f"{check:016x}", "samples": index.stats.samples}
        )
        table.append((file.name, segment.bytes, index))
        stats.merge(index.stats)
    twice = duplicates([index for _, _, index in table])
    if twice:
        raise StoreError(
            f"{root}: sample {twice[0].hex()} is stored {len(twice) + 1} times or more; collect into another folder"
        )
    complete = dataclasses.replace(
        manifest,
        state="complete",
        counts=stats.counts(),
        histograms=stats.summary(),
        segments=tuple(entries),
        bucket_edges=plan.bucket_edges,
    )
    disk.replace(root / JOURNAL, journal.expected(table))
    for file in sorted(root.glob("journal-*.jsonl")):
        with disk_errors(file, "remove"):
            disk.remove(file)
    disk.replace(root / MANIFEST, pack(complete))
    return complete


def segment_files(root: Path) -> list[Path]:
    """The store's segment files by name. Raises StoreError for a file that is not one."""
    files = sorted((root / SEGMENTS).glob("*.mrs"))
    for file in files:
        parse_name(file)
    return files


def duplicates(indexes: Sequence[Index]) -> list[bytes]:
    """Uids stored more than once."""
    keys, counts = np.unique(keys_of(indexes), return_counts=True)
    return [key.tobytes().ljust(UID_BYTES, b"\0") for key in keys[counts > 1]]


def keys_of(indexes: Sequence[Index]) -> Array:
    """[S] void16: the uids of all indexes, in order."""
    rows = [np.ascontiguousarray(index.samples["uid"]) for index in indexes]
    return np.concatenate([np.zeros((0, UID_BYTES), np.uint8), *rows]).view(np.dtype((np.void, UID_BYTES))).reshape(-1)


def _seal_orphans(root: Path, plan: Manifest, disk: Disk) -> None:
    for file in segment_files(root):
        try:
            Segment(file, plan).seal()
        except Damage:
            Writer(root, rank=parse_name(file)[0], disk=disk).close()
