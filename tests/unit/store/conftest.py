"""Small stores to write, kill and damage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_replay.store import Disk, Manifest, SampleSets, Writer, begin, finish

Sample = tuple[bytes, SampleSets]

PLAN = Manifest(
    model="m" * 64,
    tokenizer="t" * 64,
    template="p" * 64,
    dataset="d" * 64,
    vocab_size=1000,
    vocab_padded=1024,
    tau=0.95,
    k_max=20,
    min_set_size=2,
    strategy="bucket",
    fraction=0.5,
    buckets=5,
    seed=42,
    dtype="fp32",
    bucket_edges=(0.1, 0.3, 0.6, 0.9),
    layout={"tensor": 1, "pipeline": 1, "data": 1},
)


class Kit:
    """The common parts of the store's tests."""

    plan = PLAN

    @staticmethod
    def sets(rng: np.random.Generator, sizes: Sequence[int], vocab: int = 1000, logits: bool = False) -> SampleSets:
        """Random valid sets of the given sizes."""
        ids = [
            np.sort(rng.choice(vocab, n, replace=False)) if vocab < 1 << 20 else _sparse(rng, n, vocab) for n in sizes
        ]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        count = len(sizes)
        return SampleSets(
            positions=np.sort(rng.choice(max(4 * count, 1), count, replace=False)).astype(np.int32),
            offsets=offsets,
            ids=np.concatenate([np.zeros(0, np.int64), *ids]).astype(np.uint32 if vocab > 1 << 31 else np.int32),
            gold_slot=np.array([rng.integers(n) for n in sizes], np.int32),
            lse=rng.normal(10, 3, count).astype(np.float32),
            outside_mass=rng.random(count).astype(np.float16).astype(np.float32),
            logits=rng.normal(0, 5, int(offsets[-1])).astype(np.float32) if logits else None,
        )

    @classmethod
    def samples(cls, count: int, seed: int = 0, **options: Any) -> list[Sample]:
        """Samples of 0 to 5 positions with sets of 1 to 21 ids."""
        rng = np.random.default_rng(seed)
        return [
            (rng.bytes(16), cls.sets(rng, rng.integers(1, 22, rng.integers(0, 6)).tolist(), **options))
            for _ in range(count)
        ]

    @staticmethod
    def collect(
        path: Path,
        samples: Sequence[Sample],
        disk: Disk | None = None,
        block: int = 600,
        segment: int = 1500,
        **changes: Any,
    ) -> None:
        """Do as `collect` does, with the same command whether the store is new or unfinished."""
        plan = dataclasses.replace(PLAN, **changes)
        begin(path, plan, disk)
        with Writer(path, block_bytes=block, segment_bytes=segment, disk=disk) as writer:
            for uid, sets in samples:
                if uid not in writer.done:
                    writer.add(uid, sets)
        finish(path, plan, disk)

    @staticmethod
    def files(path: Path) -> dict[str, bytes]:
        """Every file of a store, by relative name."""
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}

    @staticmethod
    def equal(a: SampleSets, b: SampleSets) -> bool:
        names = ("positions", "offsets", "ids", "gold_slot", "lse", "outside_mass")
        return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)


def _sparse(rng: np.random.Generator, count: int, vocab: int) -> np.ndarray:
    return np.sort(vocab - 1 - np.unique(rng.integers(0, vocab, 2 * count + 8))[:count])


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """A finished store of 24 samples in several blocks and segments."""

    def make(name: str = "store", samples: Sequence[Sample] | None = None, **options: Any) -> Path:
        Kit.collect(tmp_path / name, Kit.samples(24) if samples is None else samples, **options)
        return tmp_path / name

    return make
