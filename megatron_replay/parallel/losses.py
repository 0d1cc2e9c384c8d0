"""The head's tasks for training: from hidden states to one loss a position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_replay.ops import CandidateSets, LocalSets, linear_cross_entropy, restricted_linear_cross_entropy
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.mcore.head import Task
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import TaskOf
from megatron_replay.store import SampleSets


def sets_of(model: Model, stored: Sequence[SampleSets]) -> LocalSets:
    """The candidate sets of several samples, one after the other, as the loss on this rank wants them: its part of the
    vocabulary, by position and by id, on its device."""
    each = [CandidateSets.of(sets) for sets in stored]
    return CandidateSets.cat(each).local(vocab_shard(model)).indexed().to(model.world.torch_device)


def restricted_task(model: Model, kernels: str = "auto") -> TaskOf:
    """Cross-entropy over each position's stored set (paper section 2); the batch carries the sets in notes["sets"],
    local or whole."""
    shard = vocab_shard(model)

    def task_of(batch: MicroBatch) -> Task:
        def task(hidden: Tensor, weight: Tensor) -> Tensor:
            return restricted_linear_cross_entropy(
                hidden, weight, batch.notes["sets"], shard, main_grad=_main_grad(weight), kernels=kernels
            )

        return task

    return task_of


def _main_grad(weight: Tensor) -> Tensor | None:
    """Where megatron accumulates the gradient of a weight that is trained, over the micro-batches of a step.

    The few rows that the loss touches are added there at once: a gradient of its own would be as large as the weight.
    megatron's hook finds no `weight.grad`, or that of a tied embedding alone, and adds nothing twice.
    """
    return getattr(weight, "main_grad", None) if weight.requires_grad and torch.is_grad_enabled() else None


def imbalance(model: Model, batches: Sequence[MicroBatch]) -> float:
    """max / mean over the tensor ranks of the candidate ids in a step's micro-batches, which carry their `sets_of`, all
    replicas together: 1 is even. Collective.

    The restricted loss costs a rank what its ids cost, and the others wait for it.
    """
    here = torch.zeros(model.world.tensor_size, dtype=torch.int64)
    if model.head is not None:
        here[model.world.tensor_rank] = sum(len(batch.notes["sets"].columns) for batch in batches)
    counts = torch.stack(model.world.gather(here)).sum(0).double()
    return float(counts.max() / counts.mean()) if counts.any() else 1.0


def full_task(model: Model, vocab_size: int) -> TaskOf:
    """Ordinary cross-entropy over the real vocabulary: the baseline."""
    shard = vocab_shard(model)

    def task_of(batch: MicroBatch) -> Task:
        return lambda hidden, weight: linear_cross_entropy(hidden, weight, batch.gold, shard, vocab_size=vocab_size)

    return task_of
