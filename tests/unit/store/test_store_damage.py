"""No byte of a store can change unseen, whatever is written there instead; and what is whole can be kept."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_replay.errors import StoreError
from megatron_replay.store import CandidateStore, Damage, Writer, begin, codec, load_manifest, repair, verify
from megatron_replay.store.format import BLOCK_HEADER, Schema, read_block_header, seal_check, unpack_header


@pytest.fixture
def small(kit, build):
    """Two segments of a few blocks, a few KB altogether."""
    return build(samples=kit.samples(8), block=400, segment=700)


def test_every_flipped_byte_is_found(kit, build):
    small = build(samples=kit.samples(5), block=300)
    files = kit.files(small)
    assert set(files) == {"manifest.json", "plan.json", "journal.jsonl", "segments/00000-000000.mrs"}
    total = 0
    for name, data in files.items():
        for at in range(len(data)):
            with (small / name).open("r+b") as file:
                file.seek(at)
                file.write(bytes([data[at] ^ (1 << at % 8)]))
            report = verify(small)
            assert not report.ok, f"{name} byte {at} unseen"
            assert any(problem.file == small / name for problem in report.problems), (name, at, report.problems)
            with (small / name).open("r+b") as file:
                file.seek(at)
                file.write(data[at : at + 1])
            total += 1
    assert total > 3500 and verify(small).ok


def test_every_flipped_byte_of_a_segment_is_found_before_it_is_used(kit, small):
    names = [n for n in kit.files(small) if n.endswith(".mrs")]
    good = {uid: CandidateStore.open(small)[uid] for uid in CandidateStore.open(small)}
    data = (small / names[0]).read_bytes()
    for at in range(0, len(data), 3):
        (small / names[0]).write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        with pytest.raises(Damage, match=r"00000-000000.mrs: byte \d+: "):
            store = CandidateStore.open(small)
            for uid in store:
                assert kit.equal(store[uid], good[uid])


def test_each_truncation_of_each_file_is_found(kit, small):
    for name, data in kit.files(small).items():
        for size in range(0, len(data), 13):
            (small / name).write_bytes(data[:size])
            assert not verify(small).ok, f"{name} cut to {size}"
        (small / name).write_bytes(data + b"\0")
        assert not verify(small).ok, f"{name} with a byte more"
        (small / name).write_bytes(data)
    assert verify(small).ok


def test_damage_is_named_with_file_and_offset_of_its_block(small):
    file = small / "segments/00000-000000.mrs"
    data = bytearray(file.read_bytes())
    size = read_block_header(file, memoryview(data)[64:], 64).bytes
    data[64 + size + 100] ^= 1
    file.write_bytes(data)
    report = verify(small)
    assert [(p.file, p.offset) for p in report.problems] == [(file, 64 + size)]
    assert "checksum" in str(report.problems[0])


def test_a_missing_segment_a_strange_one_and_a_swapped_one(kit, small, build):
    first, second = (small / "segments" / f"00000-{i:06d}.mrs" for i in (0, 1))
    data = first.read_bytes()
    first.unlink()
    with pytest.raises(Damage, match=r"00000-000000\.mrs: byte 0: this segment is missing"):
        CandidateStore.open(small)
    first.write_bytes(second.read_bytes())
    with pytest.raises(Damage):
        CandidateStore.open(small)
    first.write_bytes(data)
    (small / "segments/00007-000000.mrs").write_bytes(b"")
    assert [p.what for p in verify(small).problems] == ["this file is not in the manifest; move it away"]
    (small / "segments/00007-000000.mrs").unlink()
    other = build("other", samples=kit.samples(8, seed=9), block=400, segment=700)
    first.write_bytes((other / "segments/00000-000000.mrs").read_bytes())
    with pytest.raises(Damage):
        CandidateStore.open(small)


def test_a_manifest_that_lies_with_a_right_checksum_is_found(small):
    from megatron_replay.store.manifest import pack

    manifest = load_manifest(small)
    for change in ({"samples": 1}, {"ids": 7}):
        (small / "manifest.json").write_bytes(pack(dataclasses.replace(manifest, counts=manifest.counts | change)))
        assert not verify(small).ok
        with pytest.raises(Damage, match="counts"):
            CandidateStore.open(small)
    (small / "manifest.json").write_bytes(pack(dataclasses.replace(manifest, histograms={})))
    assert not verify(small).ok
    (small / "manifest.json").write_bytes(pack(dataclasses.replace(manifest, tau=0.5)))
    assert any("tau" in p.what for p in verify(small).problems)


def test_a_newer_format_is_told_apart_from_damage(kit, small):
    file = small / "segments/00000-000000.mrs"
    header = bytearray(file.read_bytes()[:64])
    header[8] = 2
    with pytest.raises(StoreError, match="format version 2; this program reads version 1"):
        unpack_header(file, seal_check(header), load_manifest(small).schema)


@pytest.mark.parametrize("field", range(2, 8))
@pytest.mark.parametrize("value", [1 << 31, (1 << 32) - 1, (1 << 63) + 64])
def test_lengths_are_checked_before_anything_is_allocated(field, value):
    """A header that claims the impossible is refused on its word alone: no checksum, no allocation."""
    fields = [b"MRSB", 0, 4096, 64, 3, 20, 10, 100]
    fields[field] = value if field not in (4, 5) else min(value, (1 << 32) - 1)
    rest = memoryview(BLOCK_HEADER.pack(*fields) + bytes(8 + 4096 - 64))
    with pytest.raises(Damage):
        read_block_header(Path("x"), rest, 64)


def test_a_frame_that_claims_more_than_it_may_is_refused():
    bomb = codec.encode(np.zeros(1 << 20, np.uint32), 1, "zd")
    assert len(bomb[0]) < 200
    with pytest.raises(ValueError, match="does not say"):
        codec.decode(bomb, 1000, 1, "zd")
    with pytest.raises(ValueError):
        codec.decode([b"\x28\xb5\x2f\xfd" + bytes(20)], 1000, 1, "zd")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": [5, 3, 4]}, "position 1: id 3 is out of order"),
        ({"ids": [5, 5, 4]}, "out of order"),
        ({"ids": [5, 1000, 4]}, "id 1000 .* vocabulary of 1000"),
        ({"ids": [-1, 5, 4]}, "id -1"),
        ({"gold_slot": [2, 0]}, "position 1: gold_slot"),
        ({"gold_slot": [0, -1]}, "position 4: gold_slot"),
        ({"positions": [4, 4]}, "ascending"),
        ({"positions": [-1, 4]}, "position outside"),
        ({"offsets": [0, 2, 2]}, "offsets run"),
        ({"offsets": [0, 3, 3]}, "a set holds"),
        ({"offsets": [0, 3]}, "shape"),
        ({"lse": [np.inf, 0]}, "lse is not finite"),
        ({"outside_mass": [0.5, np.nan]}, "position 4: outside_mass"),
        ({"outside_mass": [1.5, 0.1]}, "not a probability"),
    ],
)
def test_sets_that_break_a_rule_are_refused_with_sample_and_position(kit, tmp_path, change, words):
    from megatron_replay.store import SampleSets

    good = {
        "positions": np.array([1, 4]),
        "offsets": np.array([0, 2, 3]),
        "ids": np.array([3, 5, 4]),
        "gold_slot": np.array([1, 0]),
        "lse": np.zeros(2, np.float32),
        "outside_mass": np.zeros(2, np.float32),
    }
    begin(tmp_path, kit.plan)
    with Writer(tmp_path) as writer:
        with pytest.raises(StoreError, match=f"sample {'75' * 16}.*{words}"):
            writer.add(b"u" * 16, SampleSets(**good | {k: np.array(v) for k, v in change.items()}))
        writer.add(b"u" * 16, SampleSets(**good))


def test_repair_keeps_whole_blocks_and_collect_adds_the_rest(kit, build):
    samples = kit.samples(30)
    path = build(samples=samples, block=400)
    before = CandidateStore.open(path)
    good = {uid: before[uid] for uid in before}
    file = path / "segments/00000-000000.mrs"
    data = bytearray(file.read_bytes())
    data[150] ^= 255
    file.write_bytes(data)
    (path / "segments/00000-000001.mrs").unlink()
    done = repair(path)
    assert list(done.rewritten) == [file.name] and done.rewritten[file.name] > 0
    with pytest.raises(StoreError, match="unfinished"):
        CandidateStore.open(path)
    with Writer(path) as writer:
        assert 10 < len(writer.done) < 30
    kit.collect(path, samples, block=400)
    store = CandidateStore.open(path)
    assert store.verify().ok and len(store) == 30
    assert all(kit.equal(store[uid], good[uid]) for uid in good)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "journal.jsonl"])
def test_repair_of_the_text_files(kit, build, name):
    path = build()
    whole = kit.files(path)
    (path / name).write_bytes(b"{" + (path / name).read_bytes()[1:-3])
    assert not verify(path).ok
    repair(path)
    kit.collect(path, kit.samples(24))
    assert CandidateStore.open(path).verify().ok and kit.files(path).keys() == whole.keys()


def test_repair_leaves_a_whole_store_alone(kit, build):
    path = build()
    before = kit.files(path)
    assert not repair(path).rewritten
    assert kit.files(path) == before


def test_repair_of_an_unfinished_store(kit, tmp_path):
    """A torn tail is the resuming writer's; damage before it is repaired, and the blocks behind the damage are kept."""
    samples = kit.samples(30)
    begin(tmp_path, kit.plan)
    writer = Writer(tmp_path, block_bytes=300)
    for uid, sets in samples:
        writer.add(uid, sets)
    writer.flush()
    with pytest.raises(StoreError, match="another process is writing"):
        repair(tmp_path)
    stored = len(writer.done)
    writer.suspend()
    file = tmp_path / "segments/00000-000000.mrs"
    file.write_bytes(file.read_bytes() + b"torn")
    before = kit.files(tmp_path)
    assert not repair(tmp_path).rewritten and kit.files(tmp_path) == before
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    kept = repair(tmp_path).rewritten[file.name]
    assert stored - 12 < kept < stored
    kit.collect(tmp_path, samples)
    assert CandidateStore.open(tmp_path).verify().ok and len(CandidateStore.open(tmp_path)) == 30


def test_repair_without_a_plan(kit, build):
    path = build()
    (path / "plan.json").unlink()
    assert [p.file.name for p in verify(path).problems] == ["plan.json"]
    with pytest.raises(StoreError, match="no plan"):
        begin(path, kit.plan)
    repair(path)
    kit.collect(path, kit.samples(24))
    assert verify(path).ok


def test_a_forked_child_reads_the_same(kit, build):
    store = CandidateStore.open(build())
    uids = list(store)
    first = store[uids[0]]
    pid = os.fork()
    if not pid:
        os._exit(0 if kit.equal(store[uids[0]], first) and all(store[u].num_positions >= 0 for u in uids) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_schema_that_cannot_be():
    for wrong in (
        {"vocab_size": 0},
        {"vocab_size": (1 << 32) + 1},
        {"vocab_size": 5, "codec": "zip"},
        {"vocab_size": 5, "logits": "fp8"},
    ):
        with pytest.raises(StoreError):
            Schema(**wrong)
