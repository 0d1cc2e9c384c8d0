"""Time the restricted loss forward and backward against every other way to compute it or the full loss.

    python benchmarks/run.py loss --output benchmarks/results/loss.csv
    python benchmarks/run.py loss --vocab 49152 --hidden 576 --output benchmarks/results/loss.csv
    python benchmarks/run.py loss --dtype bfloat16 --only soft --output benchmarks/results/loss.csv

All methods run in one interleaved run. The weight is of `--dtype`, and the persistent gradient float32. The candidate
sets are those of `dynamic_topk` on synthetic logits (tau such that the median set has about 80 ids, k_max 200). Our
loss, on either kernels, gets them as the trainer's loader prepares them, by position and by id; one row says otherwise.
Soft targets are the softmax of random numbers. `ratio` is to ours with the weight's gradient added into the persistent
one, of the minima. Methods that take seconds run once.

`temporary_mb` is the peak of resident memory above what is held at the end (both gradients), from a process of its own.
`gradient_mb` is what the method leaves as the weight's gradient; it is 0 where the method adds into one that is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import Step, frugal, interleaved, language_logits, options, sets_of, summary, temporary_bytes, write
from torch import Tensor
from torch.nn.functional import cross_entropy, embedding
from torch.nn.utils.rnn import pad_sequence

from megatron_replay.device import Device, choose
from megatron_replay.ops import (
    CandidateSets,
    LocalSets,
    VocabShard,
    linear_cross_entropy,
    restricted_linear_cross_entropy,
)

OURS = "ours, added into main_grad"
SOFT = "soft targets, added into main_grad"
TILE = 64
"""Positions of a tile."""


class Problem:
    def __init__(
        self, vocab: int, width: int, num: int, tau: float, dtype: torch.dtype, device: Device, *, keep: bool
    ) -> None:
        self.device, self.keep = device, keep
        gen = torch.Generator().manual_seed(1)
        self.sets = sets_of(language_logits(num, vocab), tau, gen).to(device.at())
        weight = torch.empty(vocab, width).normal_(0, 0.02, generator=gen)
        self.hidden = torch.randn(num, width, generator=gen).to(device.at(), dtype).requires_grad_()
        self.weight = weight.to(device.at(), dtype).requires_grad_()
        self.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        self.prepared = self.sets.local(VocabShard(0, vocab)).indexed()
        drawn = torch.randn(len(self.sets.ids), generator=gen).split(self.sets.sizes().tolist())
        targets = torch.cat([some.softmax(0) for some in drawn]).to(device.at())
        self.aimed = self.sets.local(VocabShard(0, vocab), targets=targets).indexed()
        self.gold = self.sets.gold()
        each = self.sets.ids.long().split(self.sets.sizes().tolist())
        self.padded = pad_sequence(list(each), batch_first=True)
        self.absent = torch.arange(self.padded.shape[1], device=device.at()) >= self.sets.sizes()[:, None]
        self.slot = self.sets.gold_slot.long()

    def step(self, loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            self.hidden.grad = self.weight.grad = None
            loss().mean().backward()
            self.device.synchronize()
            if not self.keep:  # each method frees its own, not that of the one before
                self.hidden.grad = self.weight.grad = None

        return run

    def of_padded(self, logits: Tensor, rows: slice = slice(None)) -> Tensor:
        return cross_entropy(logits.masked_fill(self.absent[rows], -torch.inf), self.slot[rows], reduction="none")


def methods(p: Problem) -> dict[str, Step]:
    """Method -> one forward and backward pass."""
    compiled = torch.compile(lambda h, w, y: cross_entropy(h @ w.t(), y, reduction="none"))

    def restricted(sets: CandidateSets | LocalSets = p.prepared, **kind: Any) -> Callable[[], Tensor]:
        return lambda: restricted_linear_cross_entropy(p.hidden, p.weight, sets, **kind)

    def union() -> Tensor:
        ids, where = torch.unique(p.padded, return_inverse=True)
        return p.of_padded((p.hidden @ p.weight.index_select(0, ids).t()).gather(1, where))

    def tiles() -> Tensor:
        """The union's rows of each tile of positions: a dense product, a mask, a softmax.

        It is the form that matrix units like.
        """
        losses = []
        for start in range(0, len(p.padded), TILE):
            rows = slice(start, start + TILE)
            ids, where = torch.unique(p.padded[rows], return_inverse=True)
            union_rows = embedding(ids, p.weight, sparse=True)  # whose gradient is these rows
            losses.append(p.of_padded((p.hidden[rows] @ union_rows.t()).gather(1, where), rows))
        return torch.cat(losses)

    losses: dict[str, Callable[[], Tensor]] = {
        OURS: restricted(main_grad=p.main_grad),
        SOFT: restricted(p.aimed, main_grad=p.main_grad),
        f"{OURS}, sets not prepared": restricted(p.sets, main_grad=p.main_grad),
        "ours, touched rows": restricted(sparse=True),
        "ours, dense gradient": restricted(),
        "plain torch (embedding_bag), added into main_grad": restricted(main_grad=p.main_grad, kernels="reference"),
        "plain torch (embedding_bag), touched rows": restricted(sparse=True, kernels="reference"),
        "plain torch (embedding_bag), dense gradient": restricted(kernels="reference"),
        "union of ids, one matrix product": union,
        f"unions of {TILE} positions, matrix products": tiles,
        "gathered rows, bmm": lambda: p.of_padded(torch.bmm(p.weight[p.padded], p.hidden[:, :, None])[:, :, 0]),
        "full logits, gathered at the sets": lambda: p.of_padded((p.hidden @ p.weight.t()).gather(1, p.padded)),
        "full cross-entropy, chunked": lambda: linear_cross_entropy(p.hidden, p.weight, p.gold),
        "full cross-entropy, compiled": lambda: compiled(p.hidden, p.weight, p.gold),
        "full cross-entropy": lambda: cross_entropy(p.hidden @ p.weight.t(), p.gold, reduction="none"),
    }
    return {name: p.step(loss) for name, loss in losses.items()}


def is_slow(name: str) -> bool:
    return not name.startswith(("ours", "plain", "soft"))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or npu; temporary memory is told of the cpu only")
    parser.add_argument(
        "--memory", action="store_true", help="print the methods' temporary memory, for the program itself"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = Problem(
        *(args.vocab, args.hidden, args.positions, args.tau, getattr(torch, args.dtype), choose(args.device)),
        keep=args.memory,
    )
    steps = {
        n: s
        for n, s in methods(problem).items()
        if n == OURS or not args.only or any(n.startswith(o) for o in args.only)
    }
    if args.memory:
        for step in steps.values():
            if step is steps[OURS]:
                step()  # lazy initialisation is not its memory
        print(json.dumps({name: memory(problem, step) for name, step in steps.items()}))
        return
    rounds = {name: args.slow_rounds if is_slow(name) else args.rounds for name in steps}
    if "full cross-entropy, compiled" in steps:
        steps["full cross-entropy, compiled"]()  # compiles
    found = interleaved(steps, rounds, args.threads, processor=args.device == "cpu")
    used: dict[str, dict[str, str]] = {name: {} for name in steps}
    if args.device == "cpu":
        used = json.loads(frugal([str(Path(__file__)), *sys.argv[1:], "--memory"]).splitlines()[-1])
    sizes = {"V": args.vocab, "H": args.hidden, "T": args.positions, "threads": args.threads}
    sizes |= {
        "U": len(problem.sets.ids.unique()),
        "nnz": len(problem.sets.ids),
        "median_set": int(problem.sets.sizes().median()),
    }
    best = min(found[OURS])
    table = [
        {"method": n, **sizes, **summary(found[n]), **used[n], "ratio": f"{min(found[n]) / best:.3g}"} for n in steps
    ]  # fmt: skip
    write(table, "loss", args.output)


def memory(p: Problem, step: Step) -> dict[str, str]:
    peak = temporary_bytes(step)
    grad = p.weight.grad
    left = 0 if grad is None else grad._values().nbytes if grad.is_sparse else grad.nbytes
    return {"temporary_mb": f"{peak / 1e6:.1f}", "gradient_mb": f"{left / 1e6:.1f}"}


if __name__ == "__main__":
    main()
