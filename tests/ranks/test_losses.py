"""Losses over a model, whole and sharded, against float64 autograd through the logits of one process.

A subclass of the restricted loss sets targets and weights, and nothing else changes; every loss of the registry beside
the two that the golden runs hold is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, Outcome, batch_of, candidates, opened, whole
from models import QWEN3, draw, write_folder
from pool import fresh
from torch import Tensor

from megatron_replay.config import Optimizer
from megatron_replay.ops import CandidateSets
from megatron_replay.parallel.batch import DOMAIN, MicroBatch, Task
from megatron_replay.parallel.losses import LOSSES
from megatron_replay.parallel.losses.restricted import Restricted
from megatron_replay.parallel.losses.sampled import shared_ids
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
        ids = row[start : start + length]
        sets = candidates(ids, at)
        logits = draw(len(sets.ids), 4000, "stored logits", *ids.tolist()) / 1000
        rho = (draw(len(at), 300, "outside", *ids.tolist()) + 1) / 1000
        found.append(
            SampleSets(
                positions=at.astype(np.int32),
                offsets=sets.offsets.numpy(),
                ids=sets.ids.numpy(),
                gold_slot=sets.gold_slot.numpy(),
                logits=logits.astype(np.float32),
                lse=np.zeros(len(at), dtype=np.float32),
                outside_mass=rho.astype(np.float32),
                gold_appended=ids[at + 1] % 3 == 0,
            )
        )
    return found


@dataclass(frozen=True)
class Position:
    """One position as the losses by hand see it, in float64."""

    gold: int
    ids: Tensor
    base: Tensor
    """The stored logits of the ids."""
    rho: Tensor
    z: Tensor
    """The current logits of the real vocabulary."""

    @property
    def cross_entropy(self) -> Tensor:
        return self.z.logsumexp(0) - self.z[self.gold]


def mixed(p: Position) -> Tensor:
    z = p.z[p.ids]
    return (z.logsumexp(0) - z.mean() / 2 - p.z[p.gold] / 2) * (p.gold % 2)


def kl(p: Position) -> Tensor:
    base = p.base.log_softmax(0)
    return (base.exp() * (base - p.z[p.ids].log_softmax(0))).sum()


def kl_rest(p: Position) -> Tensor:
    inside = (1 - p.rho) * p.base.softmax(0)
    now = p.z.softmax(0)[p.ids]
    return (inside * (inside.log() - now.log())).sum() + p.rho * (p.rho.log() - (1 - now.sum()).log())


def appended(p: Position) -> Tensor:
    """Every third gold id counts as appended, see `stored`."""
    return p.cross_entropy if p.gold % 3 == 0 else p.z[p.ids].logsumexp(0) - p.z[p.gold]


def eaft(p: Position) -> Tensor:
    return p.cross_entropy * unsure(p.z.detach().topk(20).values)


def eaft_base(p: Position) -> Tensor:
    return p.cross_entropy * unsure(p.base)


def unsure(z: Tensor) -> Tensor:
    return torch.special.entr(z.softmax(0)).sum() / math.log(20)


BY_HAND: dict[str, Callable[[Position], Tensor]] = {
    "mixed": mixed,
    "kl": kl,
    "kl_rest": kl_rest,
    "appended": appended,
    "eaft": eaft,
    "eaft_base": eaft_base,
}


def by_hand(name: str, vocab: int) -> Task:
    """The task that computes a loss position by position."""

    def task(batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        found = list(positions(batch, (hidden @ weight.t())[:, :vocab]))
        if name == "talr":
            counts = [len(at) for at in batch.positions]
            return torch.cat([adapted(part) for part in torch.stack([p.cross_entropy for p in found]).split(counts)])
        if name == "sampled":
            shared, weights = shared_ids(batch.gold.numpy(), vocab)
            return torch.stack([with_shared(p, shared.tolist(), weights.tolist()) for p in found])
        return torch.stack([BY_HAND[name](p) for p in found])

    return task


def adapted(losses: Tensor) -> Tensor:
    weights = torch.exp(-losses.detach() / losses.detach().mean())
    return losses * weights * len(losses) / weights.sum()


def with_shared(p: Position, shared: list[int], log_weights: list[float]) -> Tensor:
    held = set(p.ids.tolist())
    further = [p.z[id] + log_weight for id, log_weight in zip(shared, log_weights, strict=True) if id not in held]
    return torch.cat([p.z[p.ids], torch.stack(further)]).logsumexp(0) - p.z[p.gold]


def positions(batch: MicroBatch, logits: Tensor) -> Iterator[Position]:
    rows = iter(logits)
    for sets in stored(batch):
        assert sets.logits is not None
        ids, base = (np.split(column, sets.offsets[1:-1]) for column in (sets.ids, sets.logits))
        for gold, some, theirs, rho in zip(sets.gold(), ids, base, sets.outside_mass, strict=True):
            stored_logits, outside = torch.from_numpy(theirs).double(), torch.tensor(float(rho), dtype=torch.float64)
            yield Position(int(gold), torch.from_numpy(some).long(), stored_logits, outside, next(rows))


def gradients(job: Job, name: str, hand: bool) -> Outcome:
    """On a rank: the mean loss of a step and the main gradient of every parameter."""
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        trainer.wrapped.zero_grad_buffer()
        kind = Mixed if name == "mixed" else LOSSES.get(name)
        loss = kind(model, model.spec.vocab_size)
        batches = [replace(batch, sets=loss.sets(stored(batch))) for batch in batch_of(model, 0, job.micro)]
        task = by_hand(name, model.spec.vocab_size) if hand else loss
        sums = forward_backward(model, trainer.wrapped, batches, task, trainer.timers)
        total, count = model.world.total(*sums[DOMAIN])
        grads = {
            name: (weight, parameter.main_grad.detach().double().numpy())
            for name, weight, parameter in model.parameters()
        }
        steps = [StepResult(total / count, int(count), 0.0, True)]
        return Outcome(steps, model.world.tensor_rank, model.spec.tied, grads)


NAMES = ("mixed", *(name for name in LOSSES if name not in ("restricted", "full")))
WHOLE: dict[str, Any] = {}
SPLIT = {"tensor": 2, "pipeline": 2, "sequence_parallel": True}


@pytest.mark.parametrize("layout", [WHOLE, SPLIT], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_the_one_by_hand(tmp_path: Path, name: str, layout: dict[str, Any]) -> None:
    check(tmp_path, name, layout, tied=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"replicas": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_on_further_layouts(tmp_path: Path, name: str, layout: dict[str, Any]) -> None:
    if name == "sampled" and "replicas" in layout:
        pytest.skip("its shared tokens are those of a micro-batch, which another number of replicas cuts otherwise")
    check(tmp_path, name, layout, tied=True)


def check(tmp_path: Path, name: str, layout: dict[str, Any], *, tied: bool) -> None:
    folder = write_folder(tmp_path, {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": tied})
    job = Job(folder=str(folder), dtype=torch.float64)
    there = job.on(**layout, zero1=False) if layout else job
    ours, truth = whole(fresh(there.ranks, gradients, there, name, False)), whole(fresh(1, gradients, job, name, True))
    # stored probabilities and the entropies of sets are float32
    exact = 1e-5 if name in ("kl", "kl_rest", "eaft", "eaft_base") else 1e-10
    assert ours.losses == pytest.approx(truth.losses, rel=exact)
    for weight, grad in truth.weights.items():
        assert grad.abs().max() > 0, weight
        torch.testing.assert_close(ours.weights[weight], grad, rtol=exact, atol=exact * float(grad.abs().max()))
