"""The work of the rank tests' forked ranks: build, fill and train a model.

The ranks' answers are joined and compared here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from models import draw
from pool import fresh
from torch import Tensor

from megatron_replay.config import Layout, Optimizer
from megatron_replay.device import CPU
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.models.weights import EMBEDDING, OUTPUT, Weight, restripe, unshard
from megatron_replay.ops import CandidateSets
from megatron_replay.parallel.batch import MicroBatch, Task, flatten, row_length
from megatron_replay.parallel.losses import LOSSES, Loss
from megatron_replay.parallel.mcore.model import Model, build, load_hf, vocab_shard
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.trainer import StepResult, Trainer, make_trainer

ROWS = 4
"""Rows of a global batch."""
LR = 1e-4
MOCLIP = Optimizer(name="moclip", lr=LR, weight_decay=0.1, clip_grad=1.0, options={"max_angle": 45.0})


@contextmanager
def opened(folder: str, layout: Layout, dtype: torch.dtype = torch.float32) -> Iterator[Model]:
    """A filled model on this rank."""
    with world.running(layout, CPU) as ours:
        hf = HFFolder(folder)
        model = build(hf.spec, layout, ours, dtype, seq_length=128)
        load_hf(model, hf)
        yield model


@dataclass(frozen=True, kw_only=True)
class Job:
    """A short training run."""

    folder: str
    layout: Layout = field(default_factory=Layout)
    loss: str = "restricted"
    steps: int = 10
    first: int = 0
    micro: int = ROWS
    """Rows of a micro-batch."""
    dtype: torch.dtype = torch.float32
    optimizer: Optimizer = MOCLIP
    kernels: str = "auto"
    replicas: int = 1
    """Data-parallel ranks."""

    @property
    def ranks(self) -> int:
        return self.layout.tensor * self.layout.pipeline * self.replicas

    def on(self, replicas: int = 1, **layout: Any) -> Job:
        """The same run elsewhere, in two micro-batches a step and replica."""
        return dataclasses.replace(self, replicas=replicas, layout=Layout(**layout), micro=ROWS // replicas // 2)


@dataclass(frozen=True)
class Outcome:
    """One rank's answer."""

    steps: list[StepResult]
    tensor_rank: int
    tied: bool
    weights: dict[str, tuple[Weight, np.ndarray]]
    """Global megatron name -> (how it is laid out and cut, this rank's part)."""


@dataclass(frozen=True)
class Whole:
    """The joined result of all ranks."""

    steps: list[StepResult]
    weights: dict[str, Tensor]

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def norms(self) -> list[float]:
        return [step.grad_norm for step in self.steps]


def batch_of(model: Model, step: int, micro: int) -> list[MicroBatch]:
    """This replica's micro-batches of a step: two samples a row, other lengths and numbers of positions in each.

    Every other row is the same in all steps. So gradients stand at some 60 degrees to the momentum: cut by the cap, but
    not all away.
    """
    vocab, ours = model.spec.vocab_size, model.world
    rows = [_row(step * (index % 2), index, vocab) for index in range(ROWS)]
    each = ROWS // ours.data_size
    mine = rows[ours.data_rank * each : (ours.data_rank + 1) * each]
    parts = [mine[i : i + micro] for i in range(0, each, micro)]
    length = row_length([sum(len(ids) for row in part for ids in row[0]) for part in parts], ours.tensor_size)
    return [_flatten(part, length, model) for part in parts]


def _row(step: int, index: int, vocab: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    lengths = draw(2, 9, "lengths", step, index) + 6
    ids = [draw(int(n), vocab, "ids", step, index, i) for i, n in enumerate(lengths)]
    return ids, [np.arange(2, len(sample) - 1) for sample in ids]


def _flatten(rows: Sequence[tuple[list[np.ndarray], list[np.ndarray]]], length: int, model: Model) -> MicroBatch:
    samples = [(ids, chosen) for row in rows for ids, chosen in zip(*row, strict=True)]
    batch = flatten([ids for ids, _ in samples], [chosen for _, chosen in samples], length, model.world.torch_device)
    sets = CandidateSets.cat([candidates(ids, chosen) for ids, chosen in samples])
    return dataclasses.replace(batch, sets=sets.local(vocab_shard(model)))


def candidates(ids: np.ndarray, chosen: np.ndarray) -> CandidateSets:
    """The gold token and twelve more of the first 250 ids."""
    gold = ids[chosen + 1].tolist()
    others = draw(12 * len(gold), 250, "candidates", *ids.tolist()).reshape(-1, 12).tolist()
    return CandidateSets.from_lists([[target, *row] for target, row in zip(gold, others, strict=True)], gold)


def task(model: Model, loss: str, kernels: str = "auto") -> Loss:
    return LOSSES.get(loss)(model, model.spec.vocab_size, kernels)


def train(job: Job) -> Outcome:
    """On a rank: build the model and do the job's steps."""
    with opened(job.folder, job.layout, job.dtype) as model:
        return advance(job, make_trainer(model, job.optimizer, job.kernels), task(model, job.loss, job.kernels))


def advance(job: Job, trainer: Trainer, loss: Task | None = None) -> Outcome:
    """On a rank: do the job's steps with a trainer that exists."""
    model = trainer.model
    loss = loss or task(model, job.loss)
    steps = [
        trainer.step(batch_of(model, step, job.micro), loss, LR) for step in range(job.first, job.first + job.steps)
    ]
    return Outcome(steps, model.world.tensor_rank, model.spec.tied, parts(model))


def parts(model: Model) -> dict[str, tuple[Weight, np.ndarray]]:
    return {name: (weight, parameter.detach().double().numpy()) for name, weight, parameter in model.parameters()}


def whole(outcomes: Sequence[Outcome]) -> Whole:
    """Join the ranks' answers, after a check that whatever several ranks hold is the same on all of them, bit for
    bit."""
    held: dict[str, dict[int, tuple[Weight, np.ndarray]]] = {}
    for outcome in outcomes:
        assert outcome.steps == outcomes[0].steps, "ranks disagree about loss, norm or metrics"
        for name, part in outcome.weights.items():
            known = held.setdefault(name, {}).setdefault(outcome.tensor_rank, part)
            assert np.array_equal(known[1], part[1]), f"replicas of {name} differ"
    weights = {name: _joined(name, by_rank) for name, by_rank in held.items()}
    if outcomes[0].tied and OUTPUT in weights:
        assert torch.equal(weights.pop(OUTPUT), weights[EMBEDDING]), "the tied head is not the embedding any more"
    return Whole(outcomes[0].steps, weights)


def _joined(name: str, by_rank: dict[int, tuple[Weight, np.ndarray]]) -> Tensor:
    """The whole tensor; vocabulary rows by id."""
    tensors = [torch.from_numpy(by_rank[rank][1]) for rank in sorted(by_rank)]
    weight = by_rank[0][0]
    if weight.axis is None:
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors), f"tensor ranks differ in {name}"
    whole = unshard(tensors, weight.axis)
    return restripe(whole, striped=False) if weight.striped else whole


def run(job: Job, function: Callable[..., Outcome] = train, *args: Any) -> Whole:
    """The job on as many forked ranks as `job.ranks`."""
    return whole(fresh(job.ranks, function, job, *args))


def differences(ours: Whole, truth: Whole, strays: int = 0) -> dict[str, float]:
    """Largest difference of the losses, the gradient norms, the optimizer's metrics (both relative) and the final
    weights.

    strays: this many weights are left out, the farthest. Where a first gradient is nothing but rounding, arctan2 still
    moves the weight by lr pi / 4, one way or the other.
    """
    assert ours.weights.keys() == truth.weights.keys()
    pairs = list(zip(ours.steps, truth.steps, strict=True))
    assert all(
        a.positions == b.positions and a.applied == b.applied and a.metrics.keys() == b.metrics.keys() for a, b in pairs
    )
    weights = torch.cat([(ours.weights[name] - truth.weights[name]).abs().flatten() for name in truth.weights])
    farthest = weights.topk(strays + 1).values
    assert not strays or farthest[0] <= 2 * len(pairs) * LR, "no weight can have moved as far"
    return {
        "loss": max(abs(a.loss - b.loss) for a, b in pairs),
        "norm": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in pairs),
        "metrics": max(
            abs(a.metrics[key] - b.metrics[key]) / max(1.0, abs(b.metrics[key])) for a, b in pairs for key in b.metrics
        ),
        "weights": float(farthest[-1]),
    }


def same(ours: Whole, truth: Whole, tolerance: float = 1e-5, strays: int = 0) -> None:
    found = differences(ours, truth, strays)
    assert all(difference <= tolerance for difference in found.values()), found
