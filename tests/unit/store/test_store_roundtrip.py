"""A store is read as it was written: every codec, every shape of sample, every type of logit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import StoreError
from megatron_replay.store import (
    CandidateStore,
    SampleSets,
    Writer,
    begin,
    codec,
    compare,
    export,
    finish,
    format,
    manifest,
)
from megatron_replay.store import block as blocks
from megatron_replay.store.columns import as_stored, columns
from megatron_replay.store.format import Schema, block_at

VOCABULARIES = (1, 2, 300, 151_669, 1 << 24, (1 << 24) + 1, 1 << 31, 1 << 32)


@st.composite
def sample_sets(draw, schema: Schema) -> SampleSets:
    top = schema.vocab_size - 1
    one = st.sets(
        st.integers(0, top) | st.integers(max(top - 5, 0), top), min_size=1, max_size=min(12, schema.vocab_size)
    )
    sets = [sorted(s) for s in draw(st.lists(one, max_size=5))]
    count, total = len(sets), sum(map(len, sets))
    positions = sorted(draw(st.sets(st.integers(0, (1 << 31) - 1), min_size=count, max_size=count)))
    number = st.floats(-60_000, 60_000, width=32)
    return SampleSets(
        positions=np.array(positions, np.int32),
        offsets=np.concatenate([[0], np.cumsum([len(s) for s in sets])]).astype(np.int64),
        ids=np.array([i for s in sets for i in s], np.uint32),
        gold_slot=np.array([draw(st.integers(0, len(s) - 1)) for s in sets], np.int32),
        lse=np.array(draw(st.lists(number, min_size=count, max_size=count)), np.float32),
        outside_mass=np.array(draw(st.lists(st.floats(0, 1, width=32), min_size=count, max_size=count)), np.float32),
        logits=None
        if schema.logits == "none"
        else np.array(draw(st.lists(number, min_size=total, max_size=total)), np.float32),
        gold_appended=np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool),
    )


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_block_comes_back(data):
    schema = Schema(
        data.draw(st.sampled_from(VOCABULARIES)),
        data.draw(st.sampled_from(["raw", "zd"])),
        data.draw(st.sampled_from(["none", "fp16", "bf16"])),
    )
    samples = [
        (bytes([i]) * 16, s) for i, s in enumerate(data.draw(st.lists(sample_sets(schema), min_size=1, max_size=4)))
    ]
    stored = [(uid, as_stored(sets, schema)) for uid, sets in samples]
    part = blocks.encode(blocks.join(stored), schema, 640)
    assert len(part) % 64 == 0
    back = blocks.decode(Path("x"), block_at(Path("x"), memoryview(part), 640), 640, schema)
    assert back.uids == [uid for uid, _ in samples]
    for i, (_, sets) in enumerate(samples):
        got = back.sample(i)
        for name in ("positions", "offsets", "ids", "gold_slot", "lse", "gold_appended"):
            np.testing.assert_array_equal(getattr(got, name), getattr(sets, name), err_msg=name)
        np.testing.assert_array_equal(got.outside_mass, sets.outside_mass.astype(np.float16).astype(np.float32))
        if sets.logits is not None:
            tolerance = 2**-11 if schema.logits == "fp16" else 2**-8
            np.testing.assert_allclose(got.logits, sets.logits, rtol=tolerance, atol=2**-25)
        else:
            assert got.logits is None


@pytest.mark.parametrize("kind", ["raw", "zd"])
def test_largest_set_and_largest_vocabulary(kit, tmp_path, kind):
    rng = np.random.default_rng(1)
    sizes = [65_535, 1, 2]
    sets = kit.sets(rng, sizes, vocab=1 << 32)
    sets.ids[-1] = (1 << 32) - 1
    kit.collect(tmp_path / "s", [(b"u" * 16, sets)], codec=kind, vocab_size=1 << 32, vocab_padded=1 << 32, k_max=65_534)
    store = CandidateStore.open(tmp_path / "s")
    assert store.verify().ok
    assert kit.equal(store[b"u" * 16], sets)
    assert store[b"u" * 16].ids.dtype == np.uint32


def test_bf16_rounds_to_nearest_even():
    exact = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-30, 3e38], np.float32)
    got = codec.unpack_logits(codec.pack_logits(exact, "bf16"), "bf16")
    np.testing.assert_array_equal(got[:4], np.array([1.0, 1.0, 1 + 2**-6, -0.0], np.float32))
    np.testing.assert_allclose(got, exact, rtol=2**-8)


def test_logits_that_do_not_fit_are_refused(kit, tmp_path):
    sets = kit.sets(np.random.default_rng(0), [2], logits=True)
    begin(tmp_path, dataclasses.replace(kit.plan, logits="fp16"))
    for value, word in ((70_000.0, "bf16"), (np.nan, "not finite")):
        with Writer(tmp_path) as writer, pytest.raises(StoreError, match=word):
            writer.add(b"u" * 16, dataclasses.replace(sets, logits=np.array([value, 0], np.float32)))


def test_any_order_and_several_writers(kit, tmp_path):
    samples = kit.samples(40)
    begin(tmp_path, kit.plan)
    for rank in range(3):
        with Writer(tmp_path, rank=rank, block_bytes=500, segment_bytes=1000) as writer:
            for uid, sets in samples[rank::3]:
                writer.add(uid, sets)
    manifest = finish(tmp_path, kit.plan)
    assert manifest.counts["samples"] == 40 and len(manifest.segments) > 6
    store = CandidateStore.open(tmp_path)
    assert len(store) == 40 and set(store) == {uid for uid, _ in samples}
    for i in np.random.default_rng(2).permutation(40).tolist() * 2:
        uid, sets = samples[i]
        assert uid in store and kit.equal(store[uid], sets) and store.num_positions(uid) == sets.num_positions
    assert store.verify().ok and not list(tmp_path.glob("journal-*"))


def test_unknown_uid_is_named(build):
    store = CandidateStore.open(build())
    assert bytes(16) not in store and b"short" not in store and "text" not in store
    with pytest.raises(StoreError, match="00" * 16):
        store[bytes(16)]


def test_samples_are_the_callers_own(build):
    store = CandidateStore.open(build())
    uid = max(store, key=store.num_positions)
    store[uid].ids[:] = 0
    assert store[uid].ids.any()


def test_empty_store(kit, tmp_path):
    kit.collect(tmp_path, [])
    store = CandidateStore.open(tmp_path)
    assert len(store) == 0 and list(store) == [] and store.verify().ok and bytes(16) not in store


def test_counts_and_histograms(kit, build):
    samples = kit.samples(24)
    store = CandidateStore.open(build(samples=samples))
    sizes = np.concatenate([s.sizes() for _, s in samples])
    rho = np.concatenate([s.outside_mass for _, s in samples])
    found = store.manifest.histograms
    assert store.manifest.counts == {"samples": 24, "positions": len(sizes), "ids": int(sizes.sum())}
    assert found["set_size"]["counts"] == np.histogram(sizes, found["set_size"]["edges"])[0].tolist()
    assert found["rho"]["counts"] == np.histogram(rho, found["rho"]["edges"])[0].tolist()
    assert found["set_size_median"] == np.sort(sizes)[(len(sizes) - 1) // 2]
    assert found["size_one_share"] == (sizes == 1).mean()
    assert found["gold_appended_share"] == (sizes == 21).mean()
    assert found["capped_share"] == ((sizes >= 20) & (rho > 0.05)).mean() > 0


def test_gold_appended_from_logits(kit, build):
    """Two kept tokens reach tau; the third, least likely, is gold: appended.

    With gold among the two: not. Nothing else differs.
    """
    p = np.array([0.6, 0.38, 0.01] * 2, np.float64)
    sets = SampleSets(
        positions=np.array([1, 2], np.int32),
        offsets=np.array([0, 3, 6]),
        ids=np.array([1, 2, 3] * 2, np.int32),
        gold_slot=np.array([2, 1], np.int32),
        lse=np.zeros(2, np.float32),
        outside_mass=np.full(2, 0.01, np.float32),
        logits=np.log(p).astype(np.float32),
    )
    store = CandidateStore.open(build(samples=[(b"g" * 16, sets)]))
    assert store[b"g" * 16].gold_appended.tolist() == [True, False]
    assert store.manifest.histograms["gold_appended_share"] == 0.5


def test_a_second_token_kept_for_min_set_size_is_not_an_appended_one(kit, build):
    """The first token alone reaches tau; gold is the second, kept because a set has at least two."""
    sets = SampleSets(
        positions=np.array([0], np.int32),
        offsets=np.array([0, 2]),
        ids=np.array([1, 2], np.int32),
        gold_slot=np.array([1], np.int32),
        lse=np.zeros(1, np.float32),
        outside_mass=np.full(1, 0.01, np.float32),
        logits=np.log([0.97, 0.02]).astype(np.float32),
    )
    assert CandidateStore.open(build(samples=[(b"m" * 16, sets)]))[b"m" * 16].gold_appended.tolist() == [False]
    literal = CandidateStore.open(build("one", samples=[(b"m" * 16, sets)], min_set_size=1))
    assert literal[b"m" * 16].gold_appended.tolist() == [True]


def test_compare_ignores_segments_and_order(kit, build):
    samples = kit.samples(24)
    a = CandidateStore.open(build("a", samples))
    b = CandidateStore.open(build("b", samples[::-1], block=5000, codec="raw"))
    found = compare(a, b)
    assert found.same and found.identical == a.manifest.counts["positions"] and found.max_lse_difference == 0


def test_compare_finds_what_differs(kit, build):
    samples = kit.samples(24)
    uid, sets = next(s for s in samples if s[1].num_positions > 2)
    ids = sets.ids.copy()
    ids[sets.offsets[2] - 1] = 999  # the last id of position 1
    changed = [(u, dataclasses.replace(s, ids=ids, lse=s.lse + 1) if u == uid else s) for u, s in samples]
    a, b = CandidateStore.open(build("a", samples)), CandidateStore.open(build("b", changed[1:]))
    found = compare(a, b)
    assert found.missing_b == [samples[0][0]] and not found.missing_a and not found.same
    assert found.differing == 1 and found.max_lse_difference == pytest.approx(1)
    example = found.examples[0]
    assert (example.uid, example.position, example.only_b) == (uid, int(sets.positions[1]), (999,))
    assert example.only_a == (int(sets.ids[sets.offsets[2] - 1]),)


def test_export_lines(kit, build, tmp_path):
    samples = kit.samples(24)
    store = CandidateStore.open(build(samples=samples))
    assert export(store, tmp_path / "x.jsonl") == store.manifest.counts["positions"]
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    uid, sets = next(s for s in samples if s[1].num_positions)
    first = next(line for line in lines if line["uid"] == uid.hex())
    assert first["position"] == sets.positions[0] and first["ids"] == sets.ids[: sets.offsets[1]].tolist()
    assert first["gold"] == sets.gold()[0] and first["lse"] == pytest.approx(float(sets.lse[0]))
    with pytest.raises(StoreError, match=r"jsonl or \.parquet"):
        export(store, tmp_path / "x.csv")


def test_export_parquet(build, tmp_path):
    store = CandidateStore.open(build())
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        with pytest.raises(StoreError, match="pyarrow"):
            export(store, tmp_path / "x.parquet")
        assert not list(tmp_path.glob("*.parquet"))
    else:
        assert parquet.read_table(tmp_path / "x.parquet").num_rows == export(store, tmp_path / "x.parquet")


def test_a_later_version_reads_what_an_earlier_one_wrote(kit, build, tmp_path, monkeypatch):
    """The columns of a store are those of its own version, which manifest and segments say."""
    assert {column.since for column in columns(Schema(10, logits="fp16"))} == {1}
    assert columns(Schema(10, version=0)) == ()
    before, later = build("before"), tmp_path / "later"
    with monkeypatch.context() as patched:
        for module in (format, manifest):
            patched.setattr(module, "VERSIONS", range(1, 3))
        kit.collect(later, kit.samples(24), format_version=2)
        for path, version in ((before, 1), (later, 2)):
            store = CandidateStore.open(path)
            assert store.verify().ok and store.manifest.schema.version == version
            assert all(kit.equal(store[uid], sets) for uid, sets in kit.samples(24))
        with pytest.raises(StoreError, match="begun with format_version 1, but this run has format_version 2"):
            begin(before, dataclasses.replace(kit.plan, format_version=2))
    assert {file.read_bytes()[8] for file in later.rglob("*.mrs")} == {2}
    with pytest.raises(StoreError, match="store format version 2; this program reads version 1"):
        CandidateStore.open(later)
