"""Every loss of a shard and its gradients, as the tests of the operators' ranks compare them with the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.ops import (
    CandidateSets,
    LocalSets,
    VocabShard,
    linear_cross_entropy,
    restricted_cross_entropy,
    restricted_linear_cross_entropy,
)

NAMES = ("restricted", "logits", "logits, plain torch", "full")


def each_loss(
    hidden: Tensor,
    weight: Tensor,
    sets: CandidateSets | LocalSets,
    gold: Tensor,
    shard: VocabShard,
    scale: Tensor,
    *,
    real: int,
    chunk_rows: int,
) -> dict[str, tuple[Tensor, ...]]:
    """On a rank: loss, hidden gradient summed over the ranks, and gradient of this rank's rows `weight`, of the losses
    times `scale`."""
    weight = weight.clone().requires_grad_()
    out: dict[str, tuple[Tensor, ...]] = {}
    for name in NAMES:
        h = hidden.clone().requires_grad_()
        if name == "restricted":
            loss = restricted_linear_cross_entropy(h, weight, sets, shard)
        elif name.startswith("logits"):
            mode = "auto" if name == "logits" else "reference"
            loss = restricted_cross_entropy(h @ weight.t(), sets, shard, kernels=mode)
        else:
            loss = linear_cross_entropy(h, weight, gold, shard, vocab_size=real, chunk_rows=chunk_rows)
        dh, dw = torch.autograd.grad((loss * scale).sum(), (h, weight))
        dist.all_reduce(dh)
        out[name] = (loss.detach(), dh, dw)
    return out
