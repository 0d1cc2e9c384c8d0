"""Compare the memory that `train --dry-run` predicts for each rank with what the rank's process held at its peak.

    python benchmarks/run.py memory --output benchmarks/results/memory.csv
    python benchmarks/run.py memory --operators --output benchmarks/results/memory.csv

The model is a Qwen3 of 50 million random parameters, half of them its vocabulary. Every case trains two steps in fresh
processes. `measured_mb` is the peak of resident memory (VmHWM) of the rank of a pipeline stage that had the most. There
the allocator maps and returns every block of 64 KB or more (MALLOC_MMAP_THRESHOLD_=65536, MALLOC_TRIM_THRESHOLD_=0). So
it is what is held, without what glibc keeps for later. `predicted_mb` includes `base_mb`, the process without a model,
which the dry run measures under the same allocator. `error` is (predicted - measured) / (measured - base).

--operators measures head and restricted loss alone: one forward and backward pass above what is left when it is over.
It takes two sizes of the vocabulary (512 positions of 512 values, 100 candidates each). The weight and its gradient are
not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import frugal, temporary_bytes, write

sys.path.append(str(Path(__file__).parents[1] / "tests" / "contract"))

from tinymodel import QWEN3, write_model

from megatron_replay.ops import CandidateSets, restricted_linear_cross_entropy

MODEL = {
    **QWEN3,
    "num_hidden_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 49_152,
    "max_position_embeddings": 1024,
}
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
PARTS = ("weights", "gradients", "optimizer", "activations", "head", "passing", "base")
COLUMNS = (
    "case",
    "ranks",
    "stage",
    "vocabulary",
    *(f"{name}_mb" for name in PARTS),
    "moment",
    "predicted_mb",
    "measured_mb",
    "default_mb",
    "error",
)
PLAIN = ("device=cpu", "train.tensorboard=false", "train.iters=2", "batch.total=2", "output=out")


@dataclass(frozen=True)
class Case:
    """A run to predict and to measure."""

    name: str
    settings: tuple[str, ...]
    ranks: int = 1


RESTRICTED, FULL = "train.loss=restricted", "train.loss=full"
FP32, BF16, WHOLE = "precision=fp32", "precision=bf16", "layout.zero1=false"
SHORT, LONG, TP2, PP2 = "data.seq_length=512", "data.seq_length=1024", "layout.tensor=2", "layout.pipeline=2"

CASES = (
    Case("restricted, fp32", (RESTRICTED, FP32, SHORT)),
    Case("full, fp32", (FULL, FP32, SHORT)),
    Case("restricted, fp32, no ZeRO-1", (RESTRICTED, FP32, SHORT, WHOLE)),
    Case("full, bf16, no ZeRO-1", (FULL, BF16, SHORT, WHOLE)),
    Case("restricted, fp32, recompute full, no ZeRO-1", (RESTRICTED, FP32, LONG, WHOLE, "layout.recompute=full")),
    Case("restricted, fp32, AdaMuon, no ZeRO-1", (RESTRICTED, FP32, SHORT, WHOLE, "optimizer.name=adamuon")),
    Case("restricted, bf16, adapter of rank 16", (RESTRICTED, BF16, LONG, "adapter.rank=16")),
    Case("restricted, fp32, TP2", (RESTRICTED, FP32, LONG, TP2), 2),
    Case(
        "full, fp32, TP2, sequence parallel, no ZeRO-1",
        (FULL, FP32, LONG, TP2, WHOLE, "layout.sequence_parallel=true"),
        2,
    ),
    Case("restricted, fp32, PP2, no ZeRO-1", (RESTRICTED, FP32, SHORT, PP2, WHOLE), 2),
    Case("restricted, bf16, DP2", (RESTRICTED, BF16, SHORT), 2),
    Case("restricted, fp32, no ZeRO-1, saved", (RESTRICTED, FP32, "data.seq_length=128", WHOLE, "train.save=saved")),
    Case("restricted, bf16, DP2, saved", (RESTRICTED, BF16, "data.seq_length=256", "train.save=saved"), 2),
)
"""The layouts and switches that change what is held."""


def train(given: list[str], folder: str, dry_run: bool) -> int:
    """On a rank: run the verb, and note in a file what it predicted or held."""
    from megatron_replay.cli_args import configuration
    from megatron_replay.device import CPU
    from megatron_replay.runtime import memory_table as memory
    from megatron_replay.stages.train import run

    rank, told = int(os.environ.get("RANK", 0)), memory.predicted

    def noted(*args: Any) -> Any:
        peaks = told(*args)
        Path(folder, "predicted.json").write_text(json.dumps([{**vars(peak), "total": peak.total} for peak in peaks]))
        return peaks

    memory.predicted = noted
    code = run(configuration(None, given), dry_run=dry_run)
    if not dry_run:
        Path(folder, f"peak.{rank}").write_text(str(CPU.peak_memory()))
    return code


def questions(path: Path, count: int = 64) -> Path:
    """Samples of about a hundred tokens, drawn words, so that packed rows are nearly full."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(100, 1000, (count, 24), generator=generator).tolist()
    records = [{"prompt": "repeat", "completion": " ".join(f"n{number}" for number in row)} for row in drawn]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def here(given: list[str], ranks: int, dry_run: bool) -> None:
    """The run in this process or on its ranks; the current folder is where it writes."""
    from megatron_replay.parallel import shims
    from megatron_replay.parallel.ranks import spawn as launch

    shims.import_megatron()
    code = (
        train(given, ".", dry_run)
        if ranks == 1
        else launch.launch("memory:train", (given, ".", dry_run), {}, ranks, "cpu")
    )
    sys.exit(code)


def fresh(given: list[str], ranks: int, folder: Path, *, dry_run: bool = False) -> None:
    """`here` in a new process."""
    job = json.dumps({"given": given, "ranks": ranks, "dry_run": dry_run})
    paths = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    env = {**os.environ, **FRUGAL, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, "--job", job], env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def peak(folder: Path, case: Case, stage: int, stages: int) -> int:
    """The largest peak of the ranks of a stage; megatron lays pipeline stages out slowest."""
    each = case.ranks // stages
    return max(int((folder / f"peak.{rank}").read_text()) for rank in range(stage * each, (stage + 1) * each))


def measured(model: Path, case: Case, folder: Path) -> list[dict[str, Any]]:
    """A row for each pipeline stage."""
    given = [f"model={model}", f"data.path={folder / 'data.jsonl'}", *PLAIN, *case.settings]
    if RESTRICTED in case.settings:
        given.append(f"train.store={folder / 'store'}")
        if not (folder / "store").exists():
            collect(given, folder)
    fresh(given, case.ranks, folder, dry_run=True)
    peaks = json.loads((folder / "predicted.json").read_text())
    fresh(given, case.ranks, folder)
    held = [peak(folder, case, row["stage"], len(peaks)) for row in peaks]
    rows = []
    for row, ours in zip(peaks, held, strict=True):
        parts = {f"{name}_mb": f"{row[name] / 1e6:.0f}" for name in PARTS}
        told = {
            "case": case.name,
            "ranks": case.ranks,
            "stage": row["stage"],
            "vocabulary": "",
            **parts,
            "moment": row["moment"],
        }
        sizes = {"predicted_mb": row["total"], "measured_mb": ours}
        error = (row["total"] - ours) / (ours - row["base"])
        rows.append({**told, **{name: f"{size / 1e6:.0f}" for name, size in sizes.items()}, "error": f"{error:.3f}"})
    return rows


def collect(given: list[str], folder: Path) -> None:
    """The candidate store of all cases."""
    plain = [item for item in given if item.split("=")[0] in ("model", "data.path", "device")]
    command = [
        sys.executable,
        "-m",
        "megatron_replay",
        "collect",
        *plain,
        f"collect.store={folder / 'store'}",
        "data.seq_length=512",
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def operator(vocab: int, *, width: int = 512, num: int = 512, size: int = 100) -> int:
    """Peak bytes of one forward and backward pass of the restricted loss above what is left when it is over."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (num, size), generator=generator)
    sets = CandidateSets.from_lists(ids.tolist(), ids[:, 0].tolist())
    hidden = torch.randn(num, width, generator=generator).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    main_grad = torch.zeros_like(weight)

    def step() -> None:
        hidden.grad = weight.grad = None
        restricted_linear_cross_entropy(hidden, weight, sets, main_grad=main_grad).mean().backward()

    step()  # lazy initialisation is not its memory
    return temporary_bytes(step)


def operators() -> list[dict[str, Any]]:
    """A row for each vocabulary, each from a fresh process."""
    rows = []
    for vocab in (49_152, 151_936):
        peak = int(frugal([__file__, "--operator", str(vocab)]))
        row = {**dict.fromkeys(COLUMNS, ""), "case": "head and restricted loss alone", "ranks": 1, "vocabulary": vocab}
        rows.append({**row, "measured_mb": f"{peak / 1e6:.2f}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--operators", action="store_true", help="head and loss alone")
    parser.add_argument("--output", type=Path, help="append rows to this file; without it they are printed")
    parser.add_argument("--job", help="what a process of this program is to train, for the program itself")
    parser.add_argument("--operator", type=int, help="at which vocabulary, for the program itself")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.job:
        here(**json.loads(args.job))
    elif args.operator:
        print(operator(args.operator))
    elif args.operators:
        write(operators(), "memory", args.output)
    else:
        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder, "model"), MODEL)
            questions(Path(folder, "data.jsonl"))
            for case in CASES:
                if any(part in case.name for part in args.only):
                    write(measured(model, case, Path(folder)), "memory", args.output)


if __name__ == "__main__":
    main()
