"""The repair of a store: what is whole is kept, so that collecting again only adds what is not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_replay.errors import StoreError
from megatron_replay.store import block as blocks
from megatron_replay.store import journal
from megatron_replay.store.files import Damage, Disk, disk_errors, lock
from megatron_replay.store.finish import segment_files
from megatron_replay.store.format import ALIGN, BLOCK_MAGIC, pack_header, parse_name
from megatron_replay.store.manifest import MANIFEST, PLAN, Manifest, load, pack
from megatron_replay.store.segment import Growing, Segment, pack_footer, pack_seal


@dataclass
class Repaired:
    """The segments that `repair` wrote anew, and how many samples they still hold."""

    rewritten: dict[str, int] = field(default_factory=dict)


def repair(path: str | Path, disk: Disk | None = None) -> Repaired:
    """Rewrite each damaged segment from its whole blocks and make the store unfinished.

    `collect` then adds the samples that were lost. Everything undamaged is left unchanged, also the torn tail of an
    unfinished store, which `collect` cuts off by itself. Raises StoreError where neither plan nor manifest can be read,
    or a writer is at work.
    """
    root, disk, done = Path(path), disk or Disk(), Repaired()
    plan = _plan(root, disk)
    _alone(root)
    files = segment_files(root)
    last = {parse_name(file)[0]: file for file in files}
    for file in files:
        growing_end = file in last.values() and not (root / MANIFEST).exists()
        if _whole(file, plan) or (growing_end and _resumable(root, file, plan)):
            continue
        growing = _rewrite(Segment(file, plan), disk)
        done.rewritten[file.name] = growing.stats.samples
    if done.rewritten or not _agrees(root):
        with disk_errors(root / MANIFEST, "remove"):
            disk.remove(root / MANIFEST)
            disk.sync_folder(root)
    return done


def _plan(root: Path, disk: Disk) -> Manifest:
    try:
        return load(root / PLAN)
    except StoreError:
        manifest = load(root / MANIFEST)
    plan = dataclasses.replace(manifest, state="plan", counts={}, histograms={}, segments=())
    disk.replace(root / PLAN, pack(plan))
    return plan


def _agrees(root: Path) -> bool:
    """True where the manifest is readable, and every segment it lists is there."""
    if not (root / MANIFEST).exists():
        return True
    try:
        manifest = load(root / MANIFEST)
    except Damage:
        return False
    return [entry["name"] for entry in manifest.segments] == [file.name for file in segment_files(root)]


def _whole(file: Path, plan: Manifest) -> bool:
    segment = Segment(file, plan)
    try:
        index = segment.seal()[1]
        for row in index.blocks:
            segment.block(int(row["offset"]))
    except Damage:
        return False
    return True


def _resumable(root: Path, file: Path, plan: Manifest) -> bool:
    """True where every byte that was durable is whole, and only the tail torn."""
    mark = journal.durable(journal.path_of(root, parse_name(file)[0])).get(file.name, 0)
    growing, wrong = Segment(file, plan).scan()
    return growing.end >= mark and (wrong is None or wrong.offset > 0 or not mark)


def _alone(root: Path) -> None:
    for file in root.glob("journal-*.jsonl"):
        with disk_errors(file, "open"), file.open("r+b") as held:
            lock(held.fileno(), file)


def salvage(segment: Segment) -> Iterator[blocks.SampleBlock]:
    """Every whole block of a file, whatever is wrong around it.

    Blocks begin at multiples of 64 and prove themselves.
    """
    offset = ALIGN
    while offset + ALIGN <= segment.bytes:
        size = ALIGN
        if bytes(segment.view[offset : offset + len(BLOCK_MAGIC)]) == BLOCK_MAGIC:
            try:
                part, block = segment.block(offset)
            except Damage:
                block = None
            if block is not None:
                yield block
                size = len(part)
        offset += size


def _rewrite(segment: Segment, disk: Disk) -> Growing:
    schema, growing = segment.schema, Growing(segment.rule)
    header = pack_header(schema, *parse_name(segment.path))
    fresh = segment.path.with_name(f".{segment.path.name}.new")
    with disk_errors(fresh, "write"):
        fd = disk.create(fresh)
        try:
            disk.write(fd, header)
            for block in salvage(segment):
                part = blocks.encode(block, schema, growing.end)
                disk.write(fd, part)
                growing.add(part, block)
            footer = pack_footer(growing.index())
            disk.write(fd, footer + pack_seal(header, footer, growing.end))
            disk.sync(fd)
        finally:
            os.close(fd)
        disk.rename(fresh, segment.path)
        disk.sync_folder(segment.path.parent)
    return growing
