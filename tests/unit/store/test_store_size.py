"""The bits that an id costs at the size of vocabulary and set the store is made for."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_replay.store import CandidateStore, SampleSets, Writer, begin, finish

QWEN3 = 151_669


def zipf_sets(rng: np.random.Generator, sizes: np.ndarray) -> SampleSets:
    """Sets of ids whose ranks follow Zipf's law."""
    ids = []
    for size in sizes.tolist():
        drawn = np.unique(np.exp(rng.random(6 * size) * np.log(QWEN3)).astype(np.int64) - 1)
        ids.append(np.sort(rng.permutation(drawn)[:size]))
    lengths = np.array([len(s) for s in ids])
    return SampleSets(
        positions=np.arange(len(ids), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        ids=np.concatenate(ids).astype(np.int32),
        gold_slot=rng.integers(0, lengths).astype(np.int32),
        lse=rng.normal(20, 3, len(ids)).astype(np.float32),
        outside_mass=(rng.random(len(ids)) * 0.05).astype(np.float32),
    )


def test_bits_per_id_and_the_codecs_agree(kit, tmp_path):
    rng = np.random.default_rng(0)
    samples = [(rng.bytes(16), zipf_sets(rng, rng.integers(2, 202, 128))) for _ in range(12)]
    size = {}
    for kind in ("zd", "raw"):
        plan = dataclasses.replace(kit.plan, vocab_size=QWEN3, vocab_padded=151_680, k_max=200, codec=kind)
        begin(tmp_path / kind, plan)
        with Writer(tmp_path / kind) as writer:
            for uid, sets in samples:
                writer.add(uid, sets)
        manifest = finish(tmp_path / kind, plan)
        size[kind] = sum(entry["bytes"] for entry in manifest.segments)
        mean = manifest.counts["ids"] / manifest.counts["positions"]
        assert 80 < mean < 120
    assert size["zd"] * 8 / manifest.counts["ids"] <= 13  # everything counted: positions, lse, index, seals
    assert size["raw"] > 1.8 * size["zd"]
    a, b = CandidateStore.open(tmp_path / "zd"), CandidateStore.open(tmp_path / "raw")
    assert all(kit.equal(a[uid], sets) and kit.equal(b[uid], a[uid]) for uid, sets in ((u, a[u]) for u, _ in samples))
