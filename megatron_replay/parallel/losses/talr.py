"""Token-adaptive loss reweighting (TALR, arXiv 2509.20758): cross-entropy that leans to tokens of low loss.

w_t ~ exp(-L_t / tau), tau the mean loss of the sample, with a mean of 1 over the sample. The paper takes tau over a
batch; within a sample the loss does not depend on how the batch is cut. The weights carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.full import Full
from megatron_replay.parallel.losses.interface import LOSSES


@LOSSES.register("talr")
class TALR(Full):
    """Cross-entropy weighted by exp(-loss / mean loss) within each sample."""

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        loss = super().__call__(batch, hidden, weight)
        counts = [len(positions) for positions in batch.positions if len(positions)]
        parts = [adaptive(part) for part in loss.detach().split(counts)]
        return loss * torch.cat(parts) if parts else loss


def adaptive(loss: Tensor) -> Tensor:
    """The weights [n] of a sample's tokens with losses [n]."""
    weight = (-loss / loss.mean().clamp(min=torch.finfo(loss.dtype).tiny)).exp()
    return weight / weight.mean()
