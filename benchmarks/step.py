"""Time a whole training step, restricted loss against full at equal positions, on a real model and text.

    python benchmarks/run.py step --model MODEL --text TEXT --output benchmarks/results/step.csv

MODEL is a Hugging Face folder. TEXT is cut into `--rows` windows of `--seq-length` tokens, each a micro-batch; every
token is a target, or the share `--fraction` of them. Candidate sets are the model's own (tau 0.95, k_max 200). A step
is zero, forward, backward, reduce and an AdamW update with a learning rate of 0, so that every step does the same. Both
losses run in one interleaved run, in float32. `--ranks` sets the number of processes, of `--threads` threads each. They
are data-parallel, or `--tensor` of them tensor-parallel (heads padded where they do not divide). `ratio` is the full
loss's to it: of the minima, and the median over rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rows import about, append, machine, options
from torch import Tensor

from megatron_replay.candidates import CandidateRule
from megatron_replay.config import Layout, Optimizer
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.device import CPU
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.ops import CandidateSets
from megatron_replay.parallel.batch import MicroBatch, micro_batches
from megatron_replay.parallel.losses.full import Full
from megatron_replay.parallel.losses.restricted import Restricted
from megatron_replay.parallel.mcore.model import Model, build, load_hf, vocab_shard
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.ranks.spawn import launch
from megatron_replay.parallel.selection import Selection
from megatron_replay.parallel.trainer import make_trainer


def windows(model: Model, args: Namespace, vocab_size: int) -> tuple[list[MicroBatch], Tensor]:
    """The step's micro-batches, with the model's own candidate sets; and the sizes of the sets of all positions."""
    text = args.text.read_text(encoding="utf-8")[: 8 * args.rows * args.seq_length]
    ids = np.array(load_tokenizer(args.model).encode(text))
    length = args.seq_length
    here = model.world
    samples = [[ids[i * length : (i + 1) * length + 1]] for i in range(here.data_rank, args.rows, here.data_size)]
    drawn = np.random.default_rng(0)
    positions = [[np.sort(drawn.permutation(length)[: round(args.fraction * length)])] for _ in samples]
    found = micro_batches(samples, positions, torch.device("cpu"), multiple=here.tensor_size, share_prefixes=False)
    selection = Selection(model, CandidateRule(), vocab_size=vocab_size, chunk_rows=256)
    sets: list[CandidateSets] = []
    forward(model, found, selection, consume=lambda *_: sets.append(selection.take()))
    shard = vocab_shard(model)
    batches = [replace(batch, sets=some.local(shard)) for batch, some in zip(found, sets, strict=True)]
    return batches, torch.cat([some.sizes() for some in sets])


def run(args: Namespace) -> int:
    """On a rank: interleave the steps; the first one writes the rows."""
    torch.set_num_threads(args.threads)
    source = HFFolder(args.model)
    layout = Layout(tensor=args.tensor, head_multiple=args.tensor)
    with world.running(layout, CPU) as here:
        model = build(source.spec, layout, here, torch.float32, seq_length=args.seq_length)
        load_hf(model, source)
        size = load_tokenizer(args.model).size
        batches, sizes = windows(model, args, size)
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        compared = {
            "restricted": Restricted(model, size),
            "restricted, plain torch": Restricted(model, size, "reference"),
            "full": Full(model, size),
        }
        seconds: dict[str, list[float]] = {name: [] for name in compared}
        losses = {}
        for turn in range(args.rounds + 1):
            for name, loss in compared.items():
                here.barrier()
                began = time.perf_counter()
                losses[name] = trainer.step(batches, loss, 0.0).loss
                if turn:
                    seconds[name].append(time.perf_counter() - began)
        if here.is_main:
            write(args, seconds, losses, sizes)
    return 0


def write(args: Namespace, seconds: dict[str, list[float]], losses: dict[str, float], sizes: Tensor) -> None:
    shown = [a for a in sys.argv[1:] if a != "--output" and a != str(args.output)]
    for path in (args.model, args.text):  # its name alone
        shown = [path.name if a == str(path) else a for a in shown]
    common = about(" ".join(["python benchmarks/run.py step", *shown]), machine())
    setting = {
        "ranks": args.ranks,
        "tensor": args.tensor,
        "threads": args.threads,
        "S": args.seq_length,
        "rows": args.rows,
        "positions here": len(sizes),
        "nnz here": int(sizes.sum()),
    }
    table = []
    for name, some in seconds.items():
        paired = statistics.median(b / a for a, b in zip(some, seconds["full"], strict=True))
        ratio = {"ratio": f"{min(seconds['full']) / min(some):.3f}", "median_ratio": f"{paired:.3f}"}
        took = {"min_s": f"{min(some):.3f}", "median_s": f"{statistics.median(some):.3f}", "rounds": len(some)}
        table.append({**common, "loss": name, **setting, **took, **ratio, "nats": f"{losses[name]:.4f}"})
    append(table, args.output)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--fraction", type=float, default=1.0, help="of the tokens that are targets")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1)
    args = parser.parse_args()
    sys.exit(launch("step:run", [args], {}, args.ranks, "cpu") if args.ranks > 1 else run(args))


if __name__ == "__main__":
    main()
