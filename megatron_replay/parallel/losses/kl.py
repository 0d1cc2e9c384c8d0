"""KL divergence from the base model's stored distribution to the model, over each position's candidate set.

L_t = sum_{j in S_t} y_tj (ln y_tj - ln p~_tj), y the softmax of the stored logits over S_t and p~ that of the current
ones. Its gradient is that of the restricted loss with targets y. It is the loss of rehearsal, and the distillation of
"Learning without Forgetting" (arXiv 1606.09282) at the positions of the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_replay.ops import CandidateSets, LocalSets
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.interface import LOSSES
from megatron_replay.parallel.losses.restricted import Restricted


@dataclass(frozen=True, eq=False)
class BaseSets(LocalSets):
    """Sets whose targets are the base model's probabilities within each set."""

    entropy: Tensor | None = None
    """[N] -sum y ln y over whole sets: the restricted loss less this is KL(y || p~)."""
    outside: Tensor | None = None
    """[N] rho: the base model's probability outside each set."""


@LOSSES.register("kl")
class KL(Restricted):
    """KL(base || model) over the stored sets."""

    needs_logits = True
    log_name = "kl loss"

    def local(self, whole: CandidateSets) -> LocalSets:
        base = base_probabilities(whole)
        here = whole.local(self.shard, targets=base).indexed()
        return BaseSets(**vars(here), entropy=entropy(whole, base), outside=whole.outside_mass)

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(batch.sets, BaseSets) and batch.sets.entropy is not None
        loss = super().__call__(batch, hidden, weight)
        return loss - batch.sets.entropy.to(loss.dtype)


def base_probabilities(sets: CandidateSets) -> Tensor:
    """Softmax of the stored logits over each set, [nnz] float32."""
    assert sets.logits is not None, "a loss with needs_logits is refused a store without them"
    row = torch.repeat_interleave(sets.sizes())
    top = torch.segment_reduce(sets.logits, "max", offsets=sets.offsets)
    mass = (sets.logits - top[row]).exp_()
    return mass / torch.segment_reduce(mass, "sum", offsets=sets.offsets)[row]


def entropy(sets: CandidateSets, probability: Tensor) -> Tensor:
    """-sum p ln p over each set, [N]."""
    return torch.segment_reduce(torch.special.entr(probability), "sum", offsets=sets.offsets)
