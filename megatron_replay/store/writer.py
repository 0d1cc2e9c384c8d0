"""Writing a store: one Writer for each data-parallel rank, each with segment files of its own.

So no two ranks write one file. The bytes written depend on the sequence of `add` calls alone, never on time or on where
an earlier run was ended. A block closes when its samples are large enough, a segment when its blocks are. So a run that
was killed and resumed leaves the same bytes as one that was not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from megatron_replay.errors import StoreError
from megatron_replay.store import block as blocks
from megatron_replay.store import journal
from megatron_replay.store.columns import as_stored, check
from megatron_replay.store.counts import gold_appended
from megatron_replay.store.files import Damage, Disk, disk_errors, lock
from megatron_replay.store.format import ALIGN, UID_BYTES, pack_header, parse_name, segment_name
from megatron_replay.store.manifest import MANIFEST, SEGMENTS, Manifest, load_plan
from megatron_replay.store.sample_sets import MAX_IDS, SampleSets
from megatron_replay.store.segment import Growing, Index, Segment, is_seal, pack_footer, pack_seal

BLOCK_BYTES = 64 << 10
"""A block closes at this many bytes of plain content: two samples of 128 positions with 100 ids.

A shuffled reader decodes whole blocks.
"""
SEGMENT_BYTES = 1 << 30


class Writer:
    """Appends samples to a store that `begin` made, and goes on where an earlier run of the same rank ended.

    - `done`: uids already stored, in the files of every writer, so that a run with another number of ranks can go on
      too.
    - `recovered`: one line for each torn tail that was cut off on opening; its contents are collected again.

    Leaving a `with` block by an exception keeps whole blocks and leaves the segment open for the next run (`suspend`).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rank: int = 0,
        block_bytes: int = BLOCK_BYTES,
        segment_bytes: int = SEGMENT_BYTES,
        disk: Disk | None = None,
    ) -> None:
        """Open or resume.

        Raises StoreError: no plan, no permission, another process writing as this rank, or damage in durable data.
        """
        if not 0 <= rank <= 99_999:
            raise StoreError(f"rank must lie in 0..99999, got {rank}")
        if not 1 <= block_bytes <= MAX_IDS:
            raise StoreError(f"block_bytes must lie in 1..{MAX_IDS}, got {block_bytes}")
        self.root, self.rank = Path(path), rank
        self.plan = load_plan(self.root)
        self.rule, self.schema = self.plan.rule, self.plan.schema
        self.done: set[bytes] = set()
        self.recovered: list[str] = []
        self._block_bytes, self._segment_bytes, self._disk = block_bytes, segment_bytes, disk or Disk()
        self._open: list[tuple[bytes, SampleSets]] = []
        self._weight = 0
        self._fd: int | None = None
        self._seq = 0
        self._growing = Growing(self.rule)
        self._state = "open"
        self._complete = (self.root / MANIFEST).exists()
        self._folder = self.root / SEGMENTS
        self._journal_path = journal.path_of(self.root, rank)
        with disk_errors(self._journal_path, "write"):
            self._journal = self._disk.reopen(self._journal_path)
        try:
            lock(self._journal, self._journal_path)
            self._resume()
        except BaseException:
            self._release()
            raise

    def add(self, uid: bytes, sets: SampleSets) -> None:
        """Store one sample.

        Raises StoreError for a uid stored before, sets that break a rule, or a disk that refuses.
        """
        self._usable()
        name = f"sample {uid.hex()}"
        if len(uid) != UID_BYTES:
            raise StoreError(f"{name}: a uid has {UID_BYTES} bytes, got {len(uid)}")
        if uid in self.done:
            raise StoreError(f"{name}: already in {self.root}; each sample is stored once, skip those in Writer.done")
        if self._complete:
            raise StoreError(
                f"{self.root}: this store is complete and takes no more samples; collect into another folder"
            )
        check(sets, self.schema, name)
        if sets.gold_appended is None:
            sets = replace(sets, gold_appended=gold_appended(sets, self.rule))
        kept = as_stored(sets, self.schema)
        self._open.append((uid, kept))
        self.done.add(uid)
        self._weight += 32 + 16 * kept.num_positions + (4 if kept.logits is None else 6) * len(kept.ids)
        if self._weight >= self._block_bytes:
            self._write_block()

    def flush(self) -> None:
        """Make every closed block durable (fsync, then a journal line).

        Samples of the block still open stay in memory: its end may not depend on when this is called.
        """
        self._usable()
        if self._fd is not None:
            with self._writing():
                self._disk.sync(self._fd)
                self._note(self._path.name, self._growing.end, sealed=False)

    def close(self) -> None:
        """Write the open block and seal the segment; a second call does nothing."""
        if self._state == "closed":
            return
        self._usable()
        if self._open:
            self._write_block()
        if self._fd is not None:
            self._seal()
        self._release()
        self._state = "closed"

    def suspend(self) -> None:
        """Stop without sealing.

        Closed blocks are made durable; the open one is dropped and collected by the next run.
        """
        if self._state == "open":
            try:
                self.flush()
            finally:
                self._release()
                self._state = "closed"

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.suspend()

    def _write_block(self) -> None:
        if self._fd is not None and self._growing.end >= self._segment_bytes:
            self._seal()
        block = blocks.join(self._open)
        with self._writing():
            if self._fd is None:
                self._start()
            part = blocks.encode(block, self.schema, self._growing.end)
            self._disk.write(self._descriptor, part)
        self._growing.add(part, block)
        self._open, self._weight = [], 0
        if len(self._growing.rows) % journal.GROUP == 0:
            self.flush()

    def _start(self) -> None:
        self._growing = Growing(self.rule)
        self._fd = self._disk.create(self._path)
        self._disk.write(self._fd, pack_header(self.schema, self.rank, self._seq))
        self._disk.sync_folder(self._folder)

    def _seal(self) -> None:
        index = self._growing.index()
        footer = pack_footer(index)
        seal = pack_seal(pack_header(self.schema, self.rank, self._seq), footer, index.end)
        with self._writing():
            self._disk.write(self._descriptor, footer + seal)
            self._disk.sync(self._descriptor)
            self._note(self._path.name, index.end + len(footer) + len(seal), sealed=True)
            os.close(self._descriptor)
        self._fd, self._seq = None, self._seq + 1

    def _note(self, segment: str, size: int, *, sealed: bool) -> None:
        self._disk.write(
            self._journal,
            journal.line(segment, size, len(self._growing.rows), self._growing.stats.samples, sealed=sealed),
        )

    def _resume(self) -> None:
        marks = journal.durable(self._journal_path)
        own = sorted(self._folder.glob(f"{self.rank:05d}-*.mrs"))
        lines = b""
        for path in own:
            segment = Segment(path, self.plan)
            try:
                _, index = segment.seal()
                lines += journal.lines(path.name, segment.bytes, index, sealed=True)
                self._seq = parse_name(path)[1] + 1
            except Damage as damage:
                if path != own[-1]:
                    raise  # a later segment is begun only after this one was sealed: no kill leaves this behind
                index = self._reopen(segment, marks.get(path.name, 0), damage)
                lines += journal.lines(path.name, 0, index, sealed=False)
            self.done.update(index.uids())
        for path in sorted(set(self._folder.glob("*.mrs")) - set(own)):
            self.done.update(uids_in(path, self.plan))
        with disk_errors(self._journal_path, "write"):
            self._disk.truncate(self._journal, 0)
            self._disk.write(self._journal, lines)

    def _reopen(self, segment: Segment, mark: int, damage: Damage) -> Index:
        """Cut the torn tail off an unsealed segment and go on behind its last whole block."""
        growing, wrong = segment.scan()
        end = growing.end if segment.bytes >= ALIGN and (wrong is None or wrong.offset) else 0
        if end < mark:
            raise wrong or damage
        if end < segment.bytes:
            self.recovered.append(
                f"{segment.path}: cut off {segment.bytes - end} bytes behind the last whole block (byte {end})"
            )
        self._seq, self._growing = parse_name(segment.path)[1], growing
        with disk_errors(segment.path, "write"):
            self._fd = self._disk.reopen(segment.path)
            self._disk.truncate(self._fd, end)
            if not end:
                self._disk.write(self._fd, pack_header(self.schema, self.rank, self._seq))
            self._disk.sync(self._fd)
        return growing.index()

    @property
    def _path(self) -> Path:
        return self._folder / segment_name(self.rank, self._seq)

    @property
    def _descriptor(self) -> int:
        assert self._fd is not None
        return self._fd

    def _usable(self) -> None:
        if self._state != "open":
            raise StoreError(f"{self.root}: this writer is {self._state}; open a new one to go on")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with disk_errors(self._path, "write"):
                yield
        except StoreError:
            self._state = "stopped by an earlier error"
            self._release()
            raise

    def _release(self) -> None:
        for fd in (self._fd, self._journal):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._journal = None, -1


def uids_in(path: Path, plan: Manifest) -> list[bytes]:
    """The samples that another writer's file holds for certain: all of a sealed one, whole blocks of an unfinished one.

    That writer may be cutting off its torn tail at this moment, so an unsealed file is read, never mapped.
    """
    with disk_errors(path, "read"), path.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - ALIGN, 0))
        sealed = is_seal(file.read(ALIGN))
    segment = Segment(path, plan, copy=not sealed)
    try:
        return segment.seal()[1].uids()
    except Damage:
        return segment.scan()[0].index().uids()
