"""The restricted loss, with full cross-entropy where the gold token was appended to its set.

A gold token that the base model did not expect is the one unlikely member of its set, and gives itself away there. So
at these positions, a few per cent of them, the loss is over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_replay.ops import LocalSets, linear_cross_entropy, restricted_linear_cross_entropy
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.beside_full import BesideFull
from megatron_replay.parallel.losses.interface import LOSSES
from megatron_replay.parallel.losses.restricted import main_grad
from megatron_replay.store import SampleSets


@dataclass(frozen=True, eq=False)
class MarkedSets(LocalSets):
    """Sets with marks at the positions whose gold token was appended."""

    appended: Tensor | None = None
    """[N] bool."""


@LOSSES.register("appended")
class Appended(BesideFull):
    """The restricted loss, full where the gold token was appended."""

    def sets(self, stored: Sequence[SampleSets]) -> LocalSets:
        marks = [sets.gold_appended for sets in stored if sets.gold_appended is not None]
        appended = torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.bool_), *marks]))
        here = super().sets(stored)
        return MarkedSets(**vars(here), appended=appended.to(here.columns.device))

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(batch.sets, MarkedSets) and batch.sets.appended is not None
        grad = main_grad(weight)
        inside = restricted_linear_cross_entropy(
            hidden, weight, batch.sets, self.shard, main_grad=grad, kernels=self.kernels
        )
        at = batch.sets.appended.nonzero()[:, 0]
        whole = linear_cross_entropy(hidden[at], weight, batch.gold[at], self.shard, vocab_size=self.vocab_size)
        return inside.masked_fill(batch.sets.appended, 0.0).index_add(0, at, whole)
