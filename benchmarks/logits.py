"""Time the restricted loss from logits, forward and backward, against its plain-torch twin and others.

    python benchmarks/run.py logits --output benchmarks/results/logits.csv

All methods run in one interleaved run, in float32. The candidate sets are those of `dynamic_topk` on synthetic logits
(tau such that the median set has about 80 ids, k_max 200). The operators write into a gradient that is there. A whole
loss makes a new gradient [N, V], of which the system clears every page that is written. `ratio` is to our operators, of
the minima. Methods that build padded sets or the whole table of probabilities run once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rows import Step, interleaved, language_logits, options, sets_of, summary, write
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from megatron_replay.kernels.library import choose
from megatron_replay.ops import CandidateSets, VocabShard, restricted_cross_entropy

OURS = "ours, the operators"


def operators(mode: str, logits: Tensor, sets: CandidateSets) -> Step:
    """Both operators and nothing else: no collectives, and no gradient to be made."""
    ops, here, grad = choose(mode), sets.local(VocabShard(0, logits.shape[1])), torch.zeros_like(logits)
    table = (here.offsets, here.columns, here.gold)

    def run() -> None:
        z, stats = ops.restricted_logits_fwd(logits, *table)
        ops.restricted_logits_bwd(z, *table, stats, grad)

    return run


def methods(logits: Tensor, sets: CandidateSets) -> dict[str, Step]:
    """Method -> one forward and backward pass."""
    leaf = logits.detach().requires_grad_()
    padded = pad_sequence(list(sets.ids.long().split(sets.sizes().tolist())), batch_first=True)
    absent = torch.arange(padded.shape[1]) >= sets.sizes()[:, None]
    slot, gold = sets.gold_slot.long(), sets.gold()

    def step(loss: Callable[[], Tensor]) -> Step:
        def run() -> None:
            loss().mean().backward()
            leaf.grad = None  # each method frees its own, not that of the one before

        return run

    return {
        OURS: operators("auto", logits, sets),
        "plain torch, the operators' twins": operators("reference", logits, sets),
        "ours, the whole loss": step(lambda: restricted_cross_entropy(leaf, sets)),
        "plain torch, the whole loss": step(lambda: restricted_cross_entropy(leaf, sets, kernels="reference")),
        "gathered at the sets": step(
            lambda: cross_entropy(leaf.gather(1, padded).masked_fill(absent, -torch.inf), slot, reduction="none")
        ),
        "full cross-entropy": step(lambda: cross_entropy(leaf, gold, reduction="none")),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--tau", type=float, default=0.6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logits = torch.cat(list(language_logits(args.positions, args.vocab)))
    sets = sets_of(logits.split(128), args.tau, torch.Generator().manual_seed(1))
    steps = {
        n: s
        for n, s in methods(logits, sets).items()
        if n.startswith("ours") or not args.only or n.startswith(tuple(args.only))
    }
    rounds = {name: args.rounds if name.startswith(("ours", "plain")) else args.slow_rounds for name in steps}
    found = interleaved(steps, rounds, args.threads)
    sizes = {
        "V": args.vocab,
        "T": args.positions,
        "threads": args.threads,
        "nnz": len(sets.ids),
        "median_set": int(sets.sizes().median()),
    }
    table = [
        {"method": n, **sizes, **summary(s), "ratio": f"{min(s) / min(found[OURS]):.3g}"} for n, s in found.items()
    ]
    write(table, "logits", args.output)


if __name__ == "__main__":
    main()
