"""The restricted loss with an estimate of the probability outside each set: sampled softmax (arXiv 1412.2007).

Nothing in the restricted loss lowers a logit outside a set, while every gold token raises its own elsewhere. So the
tokens that are gold somewhere in the micro-batch take part at every position, exactly. Of the other tokens some are
drawn uniformly, each with the weight (tokens left) / (tokens drawn). So the sum of exponentials has the full one as its
mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn.functional import softplus

from megatron_replay.models.spec import ModelSpec
from megatron_replay.ops import CandidateSets, LocalSets, restricted_linear_terms, shared_log_sum_exp
from megatron_replay.parallel.activations import FLOAT, LargestMicroBatch
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.interface import LOSSES
from megatron_replay.parallel.losses.restricted import Restricted, main_grad

DRAWN = 512
"""Tokens drawn for a micro-batch, beside those that are gold in it."""


@dataclass(frozen=True, eq=False)
class SampledSets(LocalSets):
    """Sets with candidates that all positions share."""

    shared: Tensor | None = None
    """[n] rows of this rank's weight."""
    bias: Tensor | None = None
    """[N, n] logarithm of each one's weight, -inf at positions whose set holds it."""


@LOSSES.register("sampled")
class Sampled(Restricted):
    """The restricted loss with shared negatives."""

    def local(self, whole: CandidateSets) -> LocalSets:
        ids, log_weight = shared_ids(whole.gold().numpy(), self.vocab_size)
        bias = log_weight.expand(whole.num_positions, -1).masked_fill(held(whole, ids, self.vocab_size), -torch.inf)
        columns = self.shard.columns(ids)
        here = columns >= 0
        return SampledSets(**vars(super().local(whole)), shared=columns[here], bias=bias[:, here].contiguous())

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        sets = batch.sets
        assert isinstance(sets, SampledSets) and sets.shared is not None and sets.bias is not None
        grad = main_grad(weight)
        loss, inside = restricted_linear_terms(hidden, weight, sets, self.shard, main_grad=grad, kernels=self.kernels)
        outside = shared_log_sum_exp(hidden, weight, sets.shared, sets.bias.to(loss.dtype), self.shard, main_grad=grad)
        return loss + softplus(outside - inside)

    @classmethod
    def head_bytes(
        cls, spec: ModelSpec, largest: LargestMicroBatch, itemsize: int, *, rows: int, trained: bool, cpu: bool
    ) -> int:
        """The restricted loss's, and a table of the positions by the shared candidates three times over."""
        sparse = Restricted.head_bytes(spec, largest, itemsize, rows=rows, trained=trained, cpu=cpu)
        shared = DRAWN + min(largest.positions, rows)
        return sparse + 3 * largest.positions * shared * FLOAT + 2 * shared * spec.hidden_size * FLOAT


def shared_ids(gold: np.ndarray, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The ids [n] that all positions share, int64, and the logarithm of each one's weight [n], float32.

    They are the gold ids, of weight 1, and a draw from the others, which the gold ids decide.
    """
    known = np.unique(gold)
    left = np.setdiff1d(np.arange(vocab_size), known, assume_unique=True)
    count = min(DRAWN, len(left))
    seed = xxhash.xxh3_64_intdigest(np.ascontiguousarray(gold, dtype="<i8").tobytes())
    drawn = np.sort(left[np.argsort(np.random.PCG64(seed).random_raw(len(left)), kind="stable")[:count]])
    weight = math.log(len(left) / count) if count else 0.0
    log_weight = torch.cat([torch.zeros(len(known)), torch.full((count,), weight)])
    return torch.from_numpy(np.concatenate([known, drawn]).astype(np.int64)), log_weight


def held(sets: CandidateSets, ids: Tensor, vocab_size: int) -> Tensor:
    """[N, n] bool: True where a position's set holds the shared id."""
    place = torch.full((vocab_size,), -1, dtype=torch.int64)
    place[ids] = torch.arange(len(ids))
    row = torch.repeat_interleave(sets.sizes())
    at = place[sets.ids.long()]
    found = torch.zeros(sets.num_positions, len(ids), dtype=torch.bool)
    found[row[at >= 0], at[at >= 0]] = True
    return found
