"""Cross-entropy over each position's stored candidate set (arXiv 2510.09152, section 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_replay.models.spec import ModelSpec
from megatron_replay.ops import CandidateSets, LocalSets, restricted_linear_cross_entropy
from megatron_replay.parallel.activations import FLOAT, LargestMicroBatch, head_states
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.interface import LOSSES, Loss
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.store import SampleSets


@LOSSES.register("restricted")
class Restricted(Loss):
    """The restricted loss. A subclass with `targets` or `weights` of its own is another loss over the same sets."""

    needs_sets = True
    dense_gradient = False

    def targets(self, sets: CandidateSets) -> Tensor | None:
        """y [nnz] of whole sets, summing to 1 at each position; None: 1 at the gold token.

        `sets.logits` are there if the class has `needs_logits`.
        """
        return None

    def weights(self, sets: CandidateSets) -> Tensor | None:
        """w [N] of the positions of whole sets; None: 1 each."""
        return None

    def sets(self, stored: Sequence[SampleSets]) -> LocalSets:
        """The candidate sets of several samples, one after the other, on this rank's device.

        They are this rank's part of the vocabulary, by position and by id.
        """
        kept = stored if self.needs_logits else [replace(sets, logits=None) for sets in stored]
        whole = CandidateSets.cat([CandidateSets.of(sets) for sets in kept])
        return self.local(whole).to(self.model.world.torch_device)

    def local(self, whole: CandidateSets) -> LocalSets:
        """This rank's part of whole sets; a subclass may give it more columns."""
        here = whole.local(self.shard, targets=self.targets(whole), weights=self.weights(whole))
        return here.indexed()

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        assert batch.sets is not None
        return restricted_linear_cross_entropy(
            hidden, weight, batch.sets, self.shard, main_grad=main_grad(weight), kernels=self.kernels
        )

    def metrics(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        if self.model.world.tensor_size == 1:
            return {}
        return {"replay/tp_imbalance": imbalance(self.model, batches)}

    @classmethod
    def head_bytes(
        cls, spec: ModelSpec, largest: LargestMicroBatch, itemsize: int, *, rows: int, trained: bool, cpu: bool
    ) -> int:
        """The gradient of the weight is added in place: nothing here grows with V."""
        exact = max(itemsize, FLOAT)
        rounded = itemsize if itemsize < exact else 0
        mixture = largest.positions * spec.hidden_size * (exact + rounded)
        return head_states(spec, largest, itemsize) + mixture + 40 * largest.candidates


def main_grad(weight: Tensor) -> Tensor | None:
    """The buffer in which megatron accumulates the gradient of a trained weight over the micro-batches of a step.

    The few rows that the loss touches are added there at once: a gradient of its own would be as large as the weight.
    Then megatron's hook finds no `weight.grad`, or only that of a tied embedding, and adds nothing twice.
    """
    return getattr(weight, "main_grad", None) if weight.requires_grad and torch.is_grad_enabled() else None


def imbalance(model: Model, batches: Sequence[MicroBatch]) -> float:
    """max / mean over the tensor ranks of the candidate ids in a step's micro-batches; 1 is even. Collective.

    All replicas count together. The restricted loss costs a rank what its ids cost, and the others wait for it.
    """
    here = torch.zeros(model.world.tensor_size, dtype=torch.int64)
    if model.head is not None:
        here[model.world.tensor_rank] = sum(
            len(part.sets.columns) for batch in batches for part in batch.parts() if part.sets is not None
        )
    counts = torch.stack(model.world.gather(here)).sum(0).double()
    return float(counts.max() / counts.mean()) if counts.any() else 1.0
