"""Check that every byte of a store is as written. Nothing is repaired here, and nothing stops at the first finding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_replay.errors import StoreError
from megatron_replay.store import journal
from megatron_replay.store.files import Damage
from megatron_replay.store.finish import duplicates
from megatron_replay.store.format import ALIGN
from megatron_replay.store.manifest import JOURNAL, MANIFEST, PLAN, SEGMENTS, Manifest, agree, load_manifest
from megatron_replay.store.segment import Growing, Index, Segment


@dataclass(frozen=True)
class Problem:
    """One thing that is not as written."""

    file: Path
    offset: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}: byte {self.offset}: {self.what}"


@dataclass
class Report:
    """The problems that `verify` found; `ok` where it found none."""

    problems: list[Problem] = field(default_factory=list)
    segments: int = 0
    blocks: int = 0
    samples: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems


def open_listed(root: Path, manifest: Manifest, entry: dict[str, Any]) -> tuple[Segment, Index]:
    """The segment a manifest lists, its header, footer and seal checked. Raises StoreError or Damage."""
    file = root / SEGMENTS / str(entry["name"])
    if not file.exists():
        raise Damage(file, 0, "this segment is missing")
    segment = Segment(file, manifest)
    if segment.bytes != entry["bytes"]:
        raise Damage(
            file, min(segment.bytes, entry["bytes"]), f"{segment.bytes} bytes, the manifest says {entry['bytes']}"
        )
    check, index = segment.seal()
    if f"{check:016x}" != entry["check"]:
        raise Damage(
            file, segment.bytes - ALIGN, "this is a segment of another store (its seal is not the one in the manifest)"
        )
    return segment, index


def verify(path: str | Path) -> Report:
    """Check every checksum, every index and every value of a complete store, and its counts against the manifest.

    Raises StoreError only where there is no complete store to check; all damage is in the report, with file and byte
    offset.
    """
    root, report = Path(path), Report()
    try:
        manifest = load_manifest(root)
    except Damage as damage:
        report.problems.append(_problem(damage))
        return report
    try:
        agree(root, manifest)
    except Damage as damage:
        report.problems.append(_problem(damage))
    except StoreError as err:
        report.problems.append(Problem(root / PLAN, 0, str(err)))
    table: list[tuple[str, int, Index]] = []
    for entry in manifest.segments:
        try:
            segment, index = open_listed(root, manifest, entry)
        except Damage as damage:
            report.problems.append(_problem(damage))
            continue
        table.append((segment.path.name, segment.bytes, index))
        report.problems.extend(_problem(damage) for damage in _blocks(segment, index, report))
    report.problems.extend(_whole(root, manifest, table, intact=report.ok))
    return report


def _problem(damage: Damage) -> Problem:
    return Problem(damage.file, damage.offset, damage.problem)


def _blocks(segment: Segment, index: Index, report: Report) -> Iterator[Damage]:
    """Damage of the blocks, one by one, and of the footer where it does not agree with them."""
    seen = Growing(segment.rule)
    report.segments += 1
    for row in index.blocks:
        offset = int(row["offset"])
        try:
            part, block = segment.block(offset)
        except Damage as damage:
            yield damage
            continue
        report.blocks += 1
        report.samples += len(block.uids)
        seen.add(part, block)
    found = seen.index()
    if len(found.blocks) == len(index.blocks) and not found.same(index):
        yield Damage(segment.path, index.end, "the footer does not agree with the blocks")


def _whole(root: Path, manifest: Manifest, table: list[tuple[str, int, Index]], *, intact: bool) -> Iterator[Problem]:
    """The problems that only the store as a whole can show."""
    listed = {str(entry["name"]) for entry in manifest.segments}
    for file in sorted((root / SEGMENTS).iterdir()):
        if file.name not in listed:
            yield Problem(file, 0, "this file is not in the manifest; move it away")
    for uid in duplicates([index for _, _, index in table]):
        yield Problem(root / MANIFEST, 0, f"sample {uid.hex()} is stored more than once")
    if intact:
        stats = Growing(manifest.rule).stats
        for _, _, index in table:
            stats.merge(index.stats)
        if stats.counts() != manifest.counts or stats.summary() != manifest.histograms:
            yield Problem(root / MANIFEST, 0, f"counts {manifest.counts}, but the segments hold {stats.counts()}")
        yield from _journal(root, journal.expected(table))


def _journal(root: Path, expected: bytes) -> Iterator[Problem]:
    file = root / JOURNAL
    try:
        found = file.read_bytes()
    except OSError as err:
        yield Problem(file, 0, f"cannot read: {err.strerror}")
        return
    if found != expected:
        pairs = zip(found, expected, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
        yield Problem(file, at, "the journal does not agree with the segments")
