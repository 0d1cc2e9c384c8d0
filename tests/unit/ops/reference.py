"""The method written down literally on whole float64 tensors: slow, and the truth that the tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_replay.ops.sets import CandidateSets


@dataclass(frozen=True)
class ReferenceSet:
    """One position: ids ascending, and the probability outside them."""

    ids: list[int]
    outside_mass: float


def candidate_set(
    logits: Tensor,
    gold: int,
    *,
    tau: float,
    k_max: int,
    min_set_size: int = 1,
    vocab_size: int | None = None,
    always: Sequence[int] = (),
) -> ReferenceSet:
    """The rule of `dynamic_topk` for one row of logits [V], read from a full sort (arXiv 2510.09152, section 2)."""
    p = torch.softmax(logits[:vocab_size].double(), 0).tolist()
    ranked = sorted((i for i in range(len(p)) if p[i] > 0), key=lambda i: (-p[i], i))
    reached, fewest = 0.0, len(ranked)
    for place, token in enumerate(ranked, 1):
        reached += p[token]
        if tau < 1 and reached >= tau:
            fewest = place
            break
    kept = set(ranked[: min(max(fewest, min_set_size), k_max)]) | {gold, *always}
    return ReferenceSet(sorted(kept), 1 - sum(p[i] for i in kept))


def restricted_loss(logits: Tensor, sets: CandidateSets) -> Tensor:
    """[N] from logits [N, V] through ordinary operators: cross-entropy with every id outside the set at -inf."""
    rows = torch.repeat_interleave(torch.arange(sets.num_positions), sets.sizes())
    kept = torch.zeros(logits.shape, dtype=torch.bool).index_put((rows, sets.ids.long()), torch.tensor(True))
    return torch.nn.functional.cross_entropy(logits.masked_fill(~kept, -torch.inf), sets.gold(), reduction="none")


def outside_mass(logits: Tensor, sets: CandidateSets) -> Tensor:
    """rho [N], the probability of softmax(logits) outside the sets."""
    p = torch.softmax(logits.double(), 1)
    rows = torch.repeat_interleave(torch.arange(sets.num_positions), sets.sizes())
    return 1 - p.new_zeros(p.shape[0]).index_add_(0, rows, p[rows, sets.ids.long()])
