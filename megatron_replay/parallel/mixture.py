"""The loss of a step with several summands: each has positions and a loss of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses import Loss


@dataclass(frozen=True)
class Mixture:
    """The task of micro-batches with terms: the loss of each term's positions, [N], times its scale."""

    losses: Mapping[str, Loss]
    """By the names of the terms."""

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        parts = [
            self.losses[term.name](batch.part(term), hidden[term.rows], weight) * term.scale for term in batch.terms
        ]
        return torch.cat(parts)
