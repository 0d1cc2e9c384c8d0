"""Measure how the cost of the restricted loss grows, forward and backward, with each size and with tensor ranks.

    python benchmarks/run.py scale --output benchmarks/results/scale.csv

The sizes are positions T, vocabulary V, set size K and hidden size H. The runs take float32, and move one axis at a
time away from T = 1,024, V = 49,152, K = 80, H = 576 on one rank. A set's ids are drawn by Zipf's law, all sets have K
of them, and the weight's gradient is added into a persistent one. The full cross-entropy in chunks stands beside it.
`ranks` cuts the vocabulary in stripes over as many processes of one thread; the time is the slowest one's.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from rows import about, append, interleaved, machine, options, summary

from megatron_replay.config import Layout
from megatron_replay.device import CPU
from megatron_replay.models.weights import STRIPES
from megatron_replay.ops import CandidateSets, VocabShard, linear_cross_entropy, restricted_linear_cross_entropy
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.ranks.spawn import launch

AXES: dict[str, list[int]] = {
    "T": [128, 512, 1024, 4096],
    "V": [16_384, 49_152, 151_936],
    "K": [10, 40, 80, 200, 1000],
    "H": [256, 576, 1024, 2048],
}


@dataclass(frozen=True)
class Point:
    T: int = 1024
    V: int = 49_152
    K: int = 80
    H: int = 576


def zipf_sets(point: Point) -> CandidateSets:
    """T sets of K different ids of V, the frequent ones low as tokenizers number them."""
    drawn = np.random.default_rng(0)
    weights = 1 / (np.arange(point.V) + 2.7) ** 1.05
    bounds = np.cumsum(weights / weights.sum())
    sets = []
    for _ in range(point.T):
        ids: dict[int, None] = {}  # in the order in which they were drawn
        while len(ids) < point.K:
            ids |= dict.fromkeys(np.searchsorted(bounds, drawn.random(2 * point.K)).tolist())
        sets.append(list(ids)[: point.K])
    return CandidateSets.from_lists(sets, [some[0] for some in sets])


def measure(point: Point, args: Namespace, group: dist.ProcessGroup | None) -> list[dict[str, object]]:
    """Rows of one point, on every rank the slowest one's time."""
    shard = VocabShard(0, point.V) if group is None else VocabShard.of_rank(point.V, group, stripes=STRIPES)
    sets = zipf_sets(point)
    gold = sets.ids[sets.offsets[:-1] + sets.gold_slot].long()
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randn(point.T, point.H, generator=gen).requires_grad_()
    weight = torch.empty(shard.size, point.H).normal_(0, 0.02, generator=gen).requires_grad_()
    main_grad = torch.zeros_like(weight)

    def restricted() -> None:
        restricted_linear_cross_entropy(hidden, weight, sets, shard, main_grad=main_grad).sum().backward()
        hidden.grad = None

    def full() -> None:
        linear_cross_entropy(hidden, weight, gold, shard).sum().backward()
        hidden.grad = weight.grad = None

    steps = {"restricted": restricted, "full, chunked": full}
    found = interleaved(steps, {"restricted": args.rounds, "full, chunked": args.slow_rounds}, args.threads)
    return [
        {"loss": name, **asdict(point), "ranks": shards(group), **summary(slowest(some, group))}
        for name, some in found.items()
    ]


def shards(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def slowest(seconds: list[float], group: dist.ProcessGroup | None) -> list[float]:
    """The slowest rank's seconds of each round."""
    if group is None:
        return seconds
    table = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(table, op=dist.ReduceOp.MAX, group=group)
    return table.tolist()


def on_ranks(args: Namespace, ranks: int) -> int:
    with world.running(Layout(tensor=ranks), CPU) as here:
        rows = measure(Point(), args, here.tensor_group)
        if here.is_main:
            write(rows, "ranks", args)
    return 0


def write(rows: list[dict[str, object]], axis: str, args: Namespace) -> None:
    command = (
        f"python benchmarks/run.py scale --rounds {args.rounds} --slow-rounds {args.slow_rounds} --threads "
        f"{args.threads}"
    )
    append([{**about(command, machine()), "axis": axis, "threads": args.threads, **row} for row in rows], args.output)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(slow_rounds=2)
    parser.add_argument("--axes", nargs="+", default=[*AXES, "ranks"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    args = parser.parse_args()
    for axis in args.axes:
        for value in AXES.get(axis, []):
            write(measure(replace(Point(), **{axis: value}), args, None), axis, args)
    if "ranks" in args.axes:
        write(measure(Point(), args, None), "ranks", args)
        for ranks in args.ranks:
            if code := launch("scale:on_ranks", [args, ranks], {}, ranks, "cpu"):
                sys.exit(code)


if __name__ == "__main__":
    main()
