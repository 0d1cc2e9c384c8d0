"""Losses over a model: a subclass of the restricted loss sets targets and weights, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, Outcome, batch_of, candidates, opened, whole
from models import QWEN3, write_folder
from pool import fresh
from torch import Tensor

from megatron_replay.config import Optimizer
from megatron_replay.ops import CandidateSets
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.restricted import Restricted
from megatron_replay.parallel.pipeline import forward_backward
from megatron_replay.parallel.trainer import StepResult, make_trainer
from megatron_replay.store import SampleSets


class Mixed(Restricted):
    """Half of each target at gold, half spread evenly over the set; positions count by whether their gold id is odd."""

    needs_logits = True

    def targets(self, sets: CandidateSets) -> Tensor:
        assert sets.logits is not None
        even = (0.5 / sets.sizes().double()).repeat_interleave(sets.sizes())
        return even.index_add(0, sets.offsets[:-1] + sets.gold_slot, even.new_full((sets.num_positions,), 0.5))

    def weights(self, sets: CandidateSets) -> Tensor:
        return (sets.gold() % 2).float()


def stored(batch: MicroBatch) -> list[SampleSets]:
    """The sets of `jobs.batch_of`, as a store gives them, with logits."""
    row, found = batch.tokens[0].numpy(), []
    for (start, length, _), at in zip(batch.segments.tolist(), batch.positions, strict=True):
        sets = candidates(row[start : start + length], at)
        nothing = np.zeros(len(at), dtype=np.float32)
        found.append(
            SampleSets(
                positions=at.astype(np.int32),
                offsets=sets.offsets.numpy(),
                ids=sets.ids.numpy(),
                gold_slot=sets.gold_slot.numpy(),
                logits=np.zeros(len(sets.ids), dtype=np.float32),
                lse=nothing,
                outside_mass=nothing,
            )
        )
    return found


def by_hand(batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
    """The values of `Mixed`, from the logits of one process."""
    logits = hidden @ weight.t()
    losses = []
    for (gold, ids), row in zip(((g, ids) for sets in stored(batch) for g, ids in each(sets)), logits, strict=True):
        z = row[ids]
        losses.append((z.logsumexp(0) - z.mean() / 2 - row[gold] / 2) * (gold % 2))
    return torch.stack(losses)


def each(sets: SampleSets) -> list[tuple[int, Tensor]]:
    ids = np.split(sets.ids, sets.offsets[1:-1])
    return [(int(gold), torch.from_numpy(some).long()) for gold, some in zip(sets.gold(), ids, strict=True)]


def gradients(job: Job, hand: bool) -> Outcome:
    """On a rank: the mean loss of a step and the main gradient of every parameter."""
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        trainer.wrapped.zero_grad_buffer()
        loss = Mixed(model, model.spec.vocab_size)
        batches = [replace(batch, sets=loss.sets(stored(batch))) for batch in batch_of(model, 0, job.micro)]
        local = forward_backward(model, trainer.wrapped, batches, by_hand if hand else loss, trainer.timers)
        total, count = model.world.total(*local)
        grads = {
            name: (weight, parameter.main_grad.detach().double().numpy())
            for name, weight, parameter in model.parameters()
        }
        return Outcome(
            [StepResult(total / count, int(count), 0.0, True)], model.world.tensor_rank, model.spec.tied, grads
        )


@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}, {"replicas": 2}], ids=str
)
def test_targets_and_weights_of_a_subclass_are_trained_on(tmp_path: Path, layout: dict[str, Any]) -> None:
    folder = write_folder(tmp_path, {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": False})
    job = Job(folder=str(folder), dtype=torch.float64)
    there = job.on(**layout, zero1=False) if layout else job
    ours, truth = whole(fresh(there.ranks, gradients, there, False)), whole(fresh(1, gradients, job, True))
    assert ours.losses == pytest.approx(truth.losses, rel=1e-12)
    for name, grad in truth.weights.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(ours.weights[name], grad, rtol=1e-10, atol=1e-12)
