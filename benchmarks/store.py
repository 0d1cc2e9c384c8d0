"""Measure the candidate store's size and speed on Zipf-like ids of Qwen3's vocabulary.

    python benchmarks/store.py --output benchmarks/results/store.csv

The store has samples of 128 positions and sets of 2 to 201 ids (mean about 100); the run has one thread and a warm
cache. Times are processor time of this process, so that neighbours on the machine do not count; fsync's waiting does
not either. Rows carry the commit they were measured at.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_replay.store import CandidateStore, Manifest, SampleSets, Writer, begin, finish, verify

VOCAB, POSITIONS = 151_669, 128
HEADER = ("date", "commit", "command", "machine", "metric", "value", "unit")
PLAN = Manifest(
    model="none", tokenizer="none", template="none", dataset="zipf", vocab_size=VOCAB, vocab_padded=151_680, tau=0.95,
    k_max=200, min_set_size=2, strategy="all", fraction=1.0, buckets=1, seed=0, dtype="fp32",
)  # fmt: skip


def sample(rng: np.random.Generator) -> SampleSets:
    """128 positions; the ranks of the ids follow Zipf's law."""
    ids = []
    for size in rng.integers(2, 202, POSITIONS).tolist():
        drawn = np.unique(np.exp(rng.random(6 * size) * np.log(VOCAB)).astype(np.int64) - 1)
        ids.append(np.sort(rng.permutation(drawn)[:size]))
    sizes = np.array([len(s) for s in ids])
    return SampleSets(
        positions=np.arange(POSITIONS, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(sizes)]),
        ids=np.concatenate(ids).astype(np.int32),
        gold_slot=rng.integers(0, sizes).astype(np.int32),
        lse=rng.normal(20, 3, POSITIONS).astype(np.float32),
        outside_mass=(rng.random(POSITIONS) * 0.05).astype(np.float32),
    )


def measure(folder: Path, samples: list[tuple[bytes, SampleSets]], codec: str) -> Iterator[tuple[str, float, str]]:
    """(metric, value, unit) of writing, reading in file order, reading in random order, and verifying."""
    plan = dataclasses.replace(PLAN, codec=codec)
    begin(folder, plan)
    start = time.process_time()
    with Writer(folder) as writer:
        for uid, sets in samples:
            writer.add(uid, sets)
    write = time.process_time() - start
    manifest = finish(folder, plan)
    size = sum(int(entry["bytes"]) for entry in manifest.segments)
    num, positions, ids = len(samples), manifest.counts["positions"], manifest.counts["ids"]
    yield "mean set size", ids / positions, "ids"
    yield f"{codec} bytes per position", size / positions, "bytes"
    yield f"{codec} bits per id, all included", size * 8 / ids, "bits"
    yield f"{codec} write one sample", write / num * 1e3, "ms"
    yield f"{codec} write, of plain int32 ids", ids * 4 / write / 1e6, "MB/s"
    shuffled = np.random.default_rng(1).permutation(num).tolist()
    for name, order in (("in file order", list(range(num))), ("in random order", shuffled)):
        store = CandidateStore.open(folder)
        times = []
        for i in order:
            start = time.process_time()
            store[samples[i][0]]
            times.append(time.process_time() - start)
        yield f"{codec} read one sample {name}, mean", statistics.mean(times) * 1e3, "ms"
        yield f"{codec} read {name}, of plain int32 ids", ids * 4 / sum(times) / 1e6, "MB/s"
    start = time.process_time()
    if not verify(folder).ok:
        raise SystemExit("the store just written does not verify")
    yield f"{codec} verify", size / (time.process_time() - start) / 1e6, "MB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--machine", default="2-core x86-64")
    parser.add_argument("--output", type=Path, help="append rows to this file; without it they are printed")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    samples = [(rng.bytes(16), sample(rng)) for _ in range(args.samples)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    common = (
        datetime.date.today().isoformat(),
        commit,
        f"python benchmarks/store.py --samples {args.samples}",
        args.machine,
    )
    with tempfile.TemporaryDirectory() as folder:
        found = [row for codec in ("zd", "raw") for row in measure(Path(folder) / codec, samples, codec)]
    new = args.output is not None and not args.output.exists()
    with args.output.open("a", newline="") if args.output else sys.stdout as file:
        rows = csv.writer(file, lineterminator="\n")
        if new or not args.output:
            rows.writerow(HEADER)
        rows.writerows((*common, metric, f"{value:.4g}", unit) for metric, value, unit in dict.fromkeys(found))


if __name__ == "__main__":
    main()
