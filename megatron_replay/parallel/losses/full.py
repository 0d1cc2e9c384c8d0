"""Ordinary cross-entropy over the real vocabulary: the baseline."""

from __future__ import annotations

from torch import Tensor

from megatron_replay.models.spec import ModelSpec
from megatron_replay.ops import linear_cross_entropy
from megatron_replay.ops.full_loss import CHUNK_ROWS
from megatron_replay.parallel.activations import FLOAT, LargestMicroBatch, head_states
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.interface import LOSSES, Loss


@LOSSES.register("full")
class Full(Loss):
    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, batch.gold, self.shard, vocab_size=self.vocab_size)

    @classmethod
    def head_bytes(
        cls, spec: ModelSpec, largest: LargestMicroBatch, itemsize: int, *, rows: int, trained: bool, cpu: bool
    ) -> int:
        """A chunk of logits, and the gradient of the weight where that is trained."""
        exact = max(itemsize, FLOAT)
        low = itemsize if itemsize < exact else 0
        chunk, weight = min(largest.positions, CHUNK_ROWS) * rows, rows * spec.hidden_size
        before = chunk * itemsize if largest.positions > CHUNK_ROWS else 0  # is there until the next one is made
        logits = chunk * (exact + low) + before
        states = head_states(spec, largest, itemsize) + largest.positions * spec.hidden_size * itemsize
        if not trained:
            return states + logits
        # in bf16 a chunk's product is made, and on the cpu cast, before it is added
        product = chunk * itemsize + weight * (low + (exact if low and cpu else 0))
        return states + weight * exact + max(logits, product)
