"""Entropy-adaptive fine-tuning (EAFT, arXiv 2601.02151): cross-entropy weighted by how unsure the model is.

w_t = H_20(t) / ln 20, H_20 the entropy of the 20 likeliest tokens' renormalised probabilities. A gold token that a sure
model finds unlikely moves it little. The weights carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_replay.ops import CandidateSets, LocalSets, linear_dynamic_topk
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.full import Full
from megatron_replay.parallel.losses.interface import LOSSES
from megatron_replay.parallel.losses.kl import base_probabilities, entropy
from megatron_replay.store import SampleSets

TOP = 20
"""The likeliest tokens whose entropy counts; the paper's number."""


@LOSSES.register("eaft")
class EAFT(Full):
    """Cross-entropy weighted by the entropy of the current model."""

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        loss = super().__call__(batch, hidden, weight)
        with torch.no_grad():
            top = linear_dynamic_topk(
                hidden,
                weight,
                batch.gold,
                1.0,
                TOP,
                self.vocab_size,
                self.shard,
                keep_logits=True,
                kernels=self.kernels,
            )
        return loss * top_weights(top).to(loss)


@LOSSES.register("eaft_base")
class EAFTBase(Full):
    """Cross-entropy weighted by the entropy of the base model, from its stored logits."""

    needs_sets = True
    needs_logits = True

    def sets(self, stored: Sequence[SampleSets]) -> LocalSets:
        """The positions' weights; no candidates, as the loss is over the whole vocabulary."""
        weights = top_weights(CandidateSets.cat([CandidateSets.of(sets) for sets in stored]))
        count = len(weights)
        none = torch.zeros(0, dtype=torch.int32)
        empty = LocalSets(torch.zeros(count + 1, dtype=torch.int64), none, torch.full((count,), -1), weights=weights)
        return empty.to(self.model.world.torch_device)

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        assert batch.sets is not None and batch.sets.weights is not None
        loss = super().__call__(batch, hidden, weight)
        return loss * batch.sets.weights.to(loss.dtype)


def top_weights(sets: CandidateSets) -> Tensor:
    """H / ln 20 of the 20 likeliest ids of each set, [N]; a set of fewer counts as those, and none as more than 20."""
    return entropy(likeliest := top(sets), base_probabilities(likeliest)) / math.log(TOP)


def top(sets: CandidateSets) -> CandidateSets:
    """The sets cut to their `TOP` largest logits; only ids, offsets and logits are those of the cut sets."""
    assert sets.logits is not None
    row = torch.repeat_interleave(sets.sizes())
    order = np.lexsort((-sets.logits.cpu().numpy(), row.cpu().numpy()))
    rank = torch.from_numpy(
        np.arange(len(order)) - np.repeat(sets.offsets[:-1].cpu().numpy(), sets.sizes().cpu().numpy())
    )
    kept = torch.from_numpy(order)[rank < TOP].sort().values.to(sets.ids.device)
    sizes = sets.sizes().clamp(max=TOP)
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return CandidateSets.from_arrays(offsets, sets.ids[kept], torch.zeros_like(sets.gold_slot), sets.logits[kept])
