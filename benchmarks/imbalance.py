"""Measure how unevenly ids lie on tensor ranks: contiguous shards of the vocabulary against stripes.

    python benchmarks/run.py imbalance TOKENIZER spider_train.jsonl --label spider+qwen \\
        --output benchmarks/results/imbalance.csv

The ids are a text's, and with --store the candidate ids of a collected store as well. TOKENIZER is a folder with
tokenizer.json, tokenizer.model or *.tiktoken. Texts are plain text, or jsonl of which the values of --fields are taken,
in order, joined by newlines. A row is max / mean over the ranks; 1 is even. The number of ranks divided by it is the
best speed-up over one rank that work done id by id can get.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rows import about, append

from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.models.spec import VOCAB_MULTIPLE
from megatron_replay.models.weights import STRIPES
from megatron_replay.ops.shard import Stripes
from megatron_replay.store import CandidateStore

RANKS = (2, 4, 8)


def texts(path: Path, fields: list[str]) -> Iterator[str]:
    """The texts of a file."""
    content = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        yield content
        return
    for line in content.splitlines():
        record = json.loads(line)
        yield "\n".join(str(record[field]) for field in fields)


def imbalance(counts: np.ndarray, ranks: int, *, striped: bool) -> float:
    """max / mean over the ranks of how often the ids of each occur; counts [rows] by id."""
    ids = torch.arange(len(counts))
    rows = Stripes(len(counts), STRIPES).row_of(ids) if striped else ids
    held = np.bincount((rows * ranks // len(counts)).numpy(), weights=counts, minlength=ranks)
    return float(held.max() / held.mean())


def rounded(size: int) -> int:
    """Rows of a vocabulary, padding included."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def occurrences(tokenizer: Path, paths: list[Path], fields: list[str]) -> np.ndarray:
    """The number of times each id occurs in the texts, padding rows included."""
    known = load_tokenizer(tokenizer)
    counts = np.zeros(rounded(known.size), dtype=np.int64)
    for path in paths:
        for text in texts(path, fields):
            np.add.at(counts, known.encode(text), 1)
    return counts


def candidates(store: str) -> np.ndarray:
    """The number of sets in a store of which each id is a candidate."""
    opened = CandidateStore.open(store)
    counts = np.zeros(rounded(opened.manifest.vocab_size), dtype=np.int64)
    for uid in opened:
        np.add.at(counts, opened[uid].ids, 1)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--fields", default="question,query", help="of jsonl records, separated by commas")
    parser.add_argument("--store", help="also count this store's candidate ids")
    parser.add_argument("--label", default="", help="what text and tokenizer this is, for the rows")
    parser.add_argument("--output", type=Path, help="append rows to this file; without it they are printed")
    args = parser.parse_args()
    counted = {"ids of the text": occurrences(args.tokenizer, args.texts, args.fields.split(","))}
    if args.store:
        counted["candidate ids of the store"] = candidates(args.store)
    names = " ".join(path.name for path in args.texts)
    command = f"python benchmarks/run.py imbalance TOKENIZER {names} --fields {args.fields}" + (
        " --store STORE" if args.store else ""
    )
    common = {key: value for key, value in about(command, "").items() if key != "machine"}  # counts do not depend on it
    rows = []
    for what, counts in counted.items():
        metric = f"{args.label}: {counts.sum()} {what}, {len(counts)} rows"
        for ranks in RANKS:
            both = {
                name: f"{imbalance(counts, ranks, striped=name == 'striped'):.4g}" for name in ("contiguous", "striped")
            }
            rows.append({**common, "metric": metric, "tensor ranks": ranks, **both})
    append(rows, args.output)


if __name__ == "__main__":
    main()
