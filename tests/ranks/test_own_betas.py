"""An optimizer with betas of its own, and one without any: registered, built by the trainer, trained and resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import LR, Job, Outcome, Whole, advance, opened, run, same
from models import LLAMA, write_folder
from pool import fresh
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.config import Optimizer
from megatron_replay.optim import LOCAL, OPTIMIZERS, Placement, ReplayOptimizer, Shards
from megatron_replay.optim.adam import decayed_step
from megatron_replay.optim.base import Common, ParamUpdate, state_dtype
from megatron_replay.optim.stats import sum_of_squares
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.mcore.optimizer import foreign_options
from megatron_replay.parallel.trainer import make_trainer


class SignSGD(ReplayOptimizer):
    """A step of `lr` against the sign of the gradient; keeps nothing."""

    def __init__(
        self, params: ParamsT, lr: float, *, weight_decay: float = 0.1, shards: Shards = LOCAL, **common: Unpack[Common]
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, shards, common)

    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        pass

    def look(self, update: ParamUpdate) -> Tensor:
        return update.grad.to(state_dtype(update.param))

    def update_param(self, update: ParamUpdate) -> Tensor:
        direction = self.look(update).sign()
        squares = sum_of_squares(direction)
        decayed_step(update.param, direction, lr=self.rate(update.group), weight_decay=update.group["weight_decay"])
        return squares


class SignedMomentum(SignSGD):
    """A step against the sign of the momentum, whose decay is its only beta."""

    state_keys = ("exp_avg",)

    def __init__(self, params: ParamsT, lr: float, *, betas: tuple[float, ...] = (0.7, 0.8), **others: Any) -> None:
        super().__init__(params, lr, **others)
        self.defaults["betas"] = betas

    def look(self, update: ParamUpdate) -> Tensor:
        momentum = self.state_of(update.param)["exp_avg"]
        return momentum.lerp_(super().look(update), 1 - self.setting(update.group, "betas")[0])


KINDS = {"sign_sgd": SignSGD, "signed_momentum": SignedMomentum}
"""Registered on the ranks only, where no other test sees them."""
every = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_folder(tmp_path_factory.mktemp("llama"), {**LLAMA, "num_hidden_layers": 2}))


def settings(name: str, **others: Any) -> Optimizer:
    return Optimizer(name=name, lr=LR, **others)


def register() -> None:
    for name, kind in KINDS.items():
        OPTIMIZERS.register(name)(kind)


def train(job: Job, save: str = "", load: str = "") -> Outcome:
    """On a rank: do the job's steps, from a checkpoint and into one where they are given."""
    register()
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, job.optimizer)
        if load:
            checkpoint.load(Path(load), trainer)
        outcome = advance(job, trainer)
        if save:
            checkpoint.save(Path(save), job.first + job.steps, trainer, {"iteration": job.first + job.steps})
        return outcome


def betas(job: Job) -> tuple[Any, dict[str, str]]:
    """On a rank: the betas of the optimizer that the trainer builds, and the options it leaves out."""
    register()
    with opened(job.folder, job.layout, job.dtype) as model:
        return make_trainer(model, job.optimizer).inner.defaults.get("betas"), foreign_options(job.optimizer)


@pytest.mark.parametrize(
    ("name", "given", "wanted", "left_out"),
    [
        ("sign_sgd", None, None, []),
        ("sign_sgd", (0.5, 0.6), None, ["betas"]),
        ("signed_momentum", None, (0.7, 0.8), []),
        ("signed_momentum", (0.5, 0.6), (0.5, 0.6), []),
        ("adamw", None, (0.9, 0.95), []),
        ("moclip", None, (0.9, 0.95), []),
    ],
)
def test_the_optimizers_own_betas_apply_unless_the_run_sets_some(
    folder: str, name: str, given: Any, wanted: Any, left_out: list[str]
) -> None:
    ((found, foreign),) = fresh(1, betas, Job(folder=folder, optimizer=settings(name, betas=given)))
    assert found == wanted and list(foreign) == left_out


def test_a_step_is_against_the_sign(folder: str) -> None:
    job = Job(folder=folder, dtype=torch.float64, steps=1, optimizer=settings("sign_sgd", weight_decay=0.0))
    start, end = (run(dataclasses.replace(job, steps=steps), train).weights for steps in (0, 1))
    for name, before in start.items():
        moved = (end[name] - before).abs()
        assert torch.all((moved == 0) | ((moved - LR).abs() < 1e-12)), name
        assert moved.any(), name


@every
def test_layouts_and_sharding_change_nothing(folder: str, name: str) -> None:
    job = Job(folder=folder, dtype=torch.float64, steps=3, optimizer=settings(name))
    same(run(job.on(tensor=3), train), run(job, train), 1e-9)
    job = dataclasses.replace(job, dtype=torch.float32)
    sharded, plain = run(job.on(replicas=2), train), run(job.on(replicas=2, zero1=False), train)
    assert all(torch.equal(sharded.weights[weight], plain.weights[weight]) for weight in plain.weights)


@every
@pytest.mark.parametrize("zero1", [True, False])
def test_a_run_goes_on(folder: str, name: str, zero1: bool, tmp_path: Path) -> None:
    job = Job(folder=folder, steps=4, optimizer=settings(name)).on(replicas=2, zero1=zero1)
    straight = run(job, train)
    first = run(dataclasses.replace(job, steps=2), train, str(tmp_path))
    second = run(dataclasses.replace(job, first=2, steps=2), train, "", str(tmp_path))
    resumed = Whole([*first.steps, *second.steps], second.weights)
    assert resumed.steps == straight.steps
    assert all(torch.equal(resumed.weights[weight], straight.weights[weight]) for weight in straight.weights)
