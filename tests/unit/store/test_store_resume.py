"""A run that was killed anywhere and started again leaves the same bytes as one that was not."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateStore, Damage, Disk, Writer, begin, finish, journal
from megatron_replay.store.segment import Segment


class Fatal(Disk):
    """Ends the process at the n-th system call: before it, or for a write in the middle of its bytes."""

    def __init__(self, last: int, power: bool = False) -> None:
        self.left, self.power = last, power
        self.names: dict[int, Path] = {}
        self.unsynced: dict[Path, int] = {}

    def _count(self) -> bool:
        self.left -= 1
        return self.left < 0

    def _die(self) -> None:
        if self.power:  # what was never fsynced is gone
            for path, size in self.unsynced.items():
                os.truncate(path, size)
        os._exit(9)

    def create(self, path):
        if self._count():
            self._die()
        fd = super().create(path)
        self.names[fd], self.unsynced[path] = path, 0
        return fd

    def reopen(self, path):
        if self._count():
            self._die()
        fd = super().reopen(path)
        self.names[fd], self.unsynced[path] = path, os.fstat(fd).st_size
        return fd

    def write(self, fd, data):
        if self._count():
            super().write(fd, data[: len(data) // 2])
            self._die()
        super().write(fd, data)

    def sync(self, fd):
        if self._count():
            self._die()
        super().sync(fd)
        self.unsynced[self.names[fd]] = os.fstat(fd).st_size

    def truncate(self, fd, size):
        if self._count():
            self._die()
        super().truncate(fd, size)
        name = self.names[fd]
        self.unsynced[name] = min(size, self.unsynced[name])

    def rename(self, source, target):
        if self._count():
            self._die()
        super().rename(source, target)
        self.unsynced[target] = self.unsynced.pop(source)

    def remove(self, path):
        if self._count():
            self._die()
        super().remove(path)
        self.unsynced.pop(path, None)

    def sync_folder(self, path):
        if self._count():
            self._die()
        super().sync_folder(path)


def in_child(work) -> int:
    """Exit code of a forked process that does the work."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("power", [False, True])
def test_killed_at_every_call_then_resumed(kit, tmp_path, monkeypatch, power):
    monkeypatch.setattr(journal, "GROUP", 2)
    samples = kit.samples(16)
    kit.collect(tmp_path / "whole", samples, segment=500)
    whole = kit.files(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".mrs")]) >= 3
    for n in range(1000):
        path = tmp_path / str(n)
        code = in_child(lambda n=n, path=path: kit.collect(path, samples, Fatal(n, power), segment=500))
        if code == 0:
            break
        assert code == 9
        if (path / "plan.json").exists() and not (path / "manifest.json").exists():
            with pytest.raises(StoreError, match="run collect again"):
                CandidateStore.open(path)
        # and a second time
        assert in_child(lambda n=n, path=path: kit.collect(path, samples, Fatal(n // 2, power), segment=500)) in (0, 9)
        kit.collect(path, samples, segment=500)
        assert kit.files(path) == whole, n
    assert n > 40


def test_each_truncation_of_an_unfinished_store_is_recovered_or_refused(kit, tmp_path):
    samples = kit.samples(12)
    kit.collect(tmp_path / "whole", samples, segment=1 << 20)
    whole = kit.files(tmp_path / "whole")
    name = "segments/00000-000000.mrs"
    recovered = 0
    for size in range(0, len(whole[name]), 29):
        path = tmp_path / "cut"
        begin(path, kit.plan)
        (path / name).write_bytes(whole[name][:size])
        with Writer(path, block_bytes=600, segment_bytes=1 << 20) as writer:
            recovered += bool(writer.recovered)
            for uid, sets in samples:
                if uid not in writer.done:
                    writer.add(uid, sets)
        finish(path, kit.plan)
        assert kit.files(path) == whole, size
        (path / "manifest.json").unlink()
    assert recovered > 60


def test_durable_bytes_that_are_gone_are_damage_not_a_torn_tail(kit, tmp_path):
    begin(tmp_path, kit.plan)
    writer = Writer(tmp_path, block_bytes=300)
    for uid, sets in kit.samples(12):
        writer.add(uid, sets)
    writer.suspend()
    file = tmp_path / "segments/00000-000000.mrs"
    data = bytearray(file.read_bytes())
    data[200] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damage, match=r"00000-000000.mrs: byte 64: .*checksum.*repair") as caught:
        Writer(tmp_path)
    assert caught.value.file == file and caught.value.offset == 64


def test_done_is_the_union_over_all_writers(kit, tmp_path):
    samples = kit.samples(30)
    begin(tmp_path, kit.plan)
    for rank in range(3):
        writer = Writer(tmp_path, rank=rank, block_bytes=300)
        for uid, sets in samples[rank:20:3]:
            writer.add(uid, sets)
        writer.suspend()
    with Writer(tmp_path, rank=0, block_bytes=300) as writer:
        assert 0 < len(writer.done) < 20
        for uid, sets in samples:
            if uid not in writer.done:
                writer.add(uid, sets)
    finish(tmp_path, kit.plan)
    store = CandidateStore.open(tmp_path)
    assert set(store) == {uid for uid, _ in samples} and store.verify().ok


def test_an_exception_keeps_whole_blocks_and_the_identity_of_the_bytes(kit, tmp_path):
    samples = kit.samples(30)
    kit.collect(tmp_path / "a", samples)
    begin(tmp_path / "b", kit.plan)
    with pytest.raises(RuntimeError), Writer(tmp_path / "b", block_bytes=600, segment_bytes=1500) as writer:
        for uid, sets in samples[:17]:
            writer.add(uid, sets)
            writer.flush()  # flushing leaves no trace in the bytes
        raise RuntimeError
    kit.collect(tmp_path / "b", samples)
    assert kit.files(tmp_path / "a") == kit.files(tmp_path / "b")


def test_collecting_a_complete_store_again_changes_nothing(kit, build):
    path = build()
    before = kit.files(path)
    kit.collect(path, kit.samples(24))
    assert kit.files(path) == before
    with Writer(path) as writer, pytest.raises(StoreError, match="complete"):
        writer.add(b"n" * 16, kit.samples(1)[0][1])


def test_a_uid_is_stored_once(kit, tmp_path):
    uid, sets = kit.samples(1)[0]
    begin(tmp_path, kit.plan)
    with Writer(tmp_path) as writer:
        writer.add(uid, sets)
        with pytest.raises(StoreError, match=uid.hex()):
            writer.add(uid, sets)
        with pytest.raises(StoreError, match="16 bytes"):
            writer.add(b"short", sets)


def test_two_writers_that_stored_the_same_sample_are_found_at_the_end(kit, tmp_path):
    uid, sets = b"twice".ljust(16, b"\0"), kit.samples(1)[0][1]
    begin(tmp_path, kit.plan)
    with Writer(tmp_path, rank=0) as a, Writer(tmp_path, rank=1) as b:
        a.add(uid, sets)
        b.add(uid, sets)
    with pytest.raises(StoreError, match=uid.hex()):
        finish(tmp_path, kit.plan)


def test_two_processes_cannot_write_as_one_rank(kit, tmp_path):
    begin(tmp_path, kit.plan)
    with Writer(tmp_path), pytest.raises(StoreError, match="another process is writing"):
        Writer(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tau": 0.99}, "tau 0.95, but this run has tau 0.99"),
        ({"seed": 1}, "seed 42"),
        ({"bucket_edges": (0.5,)}, "bucket_edges"),
        ({"codec": "raw"}, "codec 'zd'"),
        ({"tokenizer": "x"}, "tokenizer"),
    ],
)
def test_other_settings_are_refused_with_both_values(kit, tmp_path, change, words):
    begin(tmp_path, kit.plan)
    other = dataclasses.replace(kit.plan, **change)
    for refuse in (begin, finish):
        with pytest.raises(StoreError, match=words.replace("[", r"\[")):
            refuse(tmp_path, other)


def test_layout_and_versions_are_no_identity(kit, tmp_path):
    begin(tmp_path, kit.plan)
    other = dataclasses.replace(kit.plan, layout={"tensor": 4}, versions={"torch": "9"})
    begin(tmp_path, other)
    assert finish(tmp_path, other).layout == {"tensor": 4}


def test_no_plan_no_store(kit, tmp_path):
    with pytest.raises(StoreError, match=r"plan\.json"):
        Writer(tmp_path)
    with pytest.raises(StoreError, match="no candidate store here"):
        CandidateStore.open(tmp_path)


def test_a_full_disk_is_one_line_and_keeps_what_was_stored(kit, tmp_path):
    class Full(Disk):
        room = 6

        def write(self, fd, data):
            self.room -= 1
            if self.room < 0:
                super().write(fd, data[:10])
                raise OSError(28, os.strerror(28))
            super().write(fd, data)

    samples = kit.samples(30)
    with pytest.raises(StoreError, match=r"No space left on device; free some space") as caught:
        kit.collect(tmp_path / "a", samples, Full())
    assert "\n" not in str(caught.value)
    with Writer(tmp_path / "a") as writer:
        assert writer.done and writer.recovered
    kit.collect(tmp_path / "a", samples)
    assert CandidateStore.open(tmp_path / "a").verify().ok


def test_a_writer_stopped_by_an_error_takes_no_more(kit, tmp_path):
    class Broken(Disk):
        broken = False

        def write(self, fd, data):
            if self.broken:
                raise OSError(5, os.strerror(5))
            super().write(fd, data)

    disk = Broken()
    begin(tmp_path, kit.plan)
    writer = Writer(tmp_path, block_bytes=1, disk=disk)
    disk.broken = True
    (first, a), (second, b) = kit.samples(2)
    with pytest.raises(StoreError, match="Input/output error"):
        writer.add(first, a)
    with pytest.raises(StoreError, match="stopped by an earlier error"):
        writer.add(second, b)
    writer.suspend()


def test_a_folder_without_permission(kit, tmp_path):
    class ReadOnly(Disk):
        def create(self, path):
            raise PermissionError(13, os.strerror(13))

    with pytest.raises(StoreError, match="Permission denied; give write permission"):
        begin(tmp_path / "a", kit.plan, ReadOnly())
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        begin(blocked / "store", kit.plan)


def test_a_read_only_folder(kit, tmp_path: Path):
    tmp_path.chmod(0o500)

    def refused():
        if os.geteuid() == 0:
            os.setuid(65_534)  # root may write anywhere
        for work in (begin, finish):
            with pytest.raises(StoreError, match=r"Permission denied"):
                work(tmp_path / "a", kit.plan)

    assert in_child(refused) == 0


def test_block_boundaries_do_not_depend_on_logits_that_are_not_stored(kit, tmp_path):
    samples = [(uid, dataclasses.replace(s, gold_appended=s.sizes() > 20)) for uid, s in kit.samples(20, logits=True)]
    kit.collect(tmp_path / "a", samples)
    kit.collect(tmp_path / "b", [(uid, dataclasses.replace(s, logits=None)) for uid, s in samples])
    assert kit.files(tmp_path / "a") == kit.files(tmp_path / "b")


def test_a_rank_may_cut_its_torn_tail_while_another_reads_it(kit, tmp_path, monkeypatch):
    """Ranks resume at the same time.

    Reading pages of a file that has just become shorter must not end the reader with SIGBUS.
    """
    begin(tmp_path, kit.plan)
    writer = Writer(tmp_path, rank=1, block_bytes=2000)
    for uid, sets in kit.samples(300):
        writer.add(uid, sets)
    writer.suspend()
    file = tmp_path / "segments/00001-000000.mrs"
    assert file.stat().st_size > 3 * 4096
    whole = Segment.scan

    def cut_meanwhile(segment):
        if segment.path == file:
            os.truncate(file, 8192)
        return whole(segment)

    monkeypatch.setattr(Segment, "scan", cut_meanwhile)
    assert in_child(lambda: Writer(tmp_path, rank=0)) == 0
