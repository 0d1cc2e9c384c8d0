"""Half fine-tuning on every layout against one process; resumed; what is frozen costs neither gradient nor state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import LR, Job, Outcome, Whole, advance, opened, run, same
from models import LLAMA, QWEN3, tied_and_untied, write_folder
from optimizer_cases import WHOLE_MODEL, registered
from pool import fresh

from megatron_replay.config import Optimizer
from megatron_replay.errors import CheckpointError, ConfigError, LayoutError
from megatron_replay.models.weights import EMBEDDING, OUTPUT
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.parallel.trainer import make_trainer

SEED = 5
HALF = 3
TRUTHS: dict[Any, Whole] = {}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    root = tmp_path_factory.mktemp("half")
    return {**tied_and_untied(root, QWEN3), "llama": str(write_folder(root / "llama", LLAMA))}


@contextmanager
def frozen(job: Job, share: float = 0.5, seed: int = SEED) -> Iterator[Model]:
    with opened(job.folder, job.layout, job.dtype) as model:
        model.freeze_half(share, seed)
        yield model


def train(job: Job) -> Outcome:
    with frozen(job) as model:
        return advance(job, make_trainer(model, job.optimizer))


def truth(folders: dict[Any, str], loss: str, model: Any) -> Whole:
    if (loss, model) not in TRUTHS:
        TRUTHS[loss, model] = run(Job(folder=folders[model], loss=loss, steps=2 * HALF), train)
    return TRUTHS[loss, model]


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("loss", "tied", "layout"),
    [
        ("restricted", True, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"}),
        ("restricted", True, {"pipeline": 4}),
        ("restricted", True, {"replicas": 2}),
        ("restricted", False, {"tensor": 4, "recompute": "selective"}),
        ("full", False, {"replicas": 2, "pipeline": 2, "zero1": False}),
        ("full", True, {"tensor": 2, "replicas": 2}),
    ],
    ids=str,
)
def test_steps_are_those_of_one_process(folders: dict[Any, str], loss: str, tied: bool, layout: dict[str, Any]) -> None:
    same(run(Job(folder=folders[tied], loss=loss, steps=2 * HALF).on(**layout), train), truth(folders, loss, tied))


def test_half_of_each_kind_moves_and_the_rest_does_not(folders: dict[Any, str]) -> None:
    found = truth(folders, "restricted", True)
    start = run(Job(folder=folders[True], steps=0), train)
    moved = {name for name in start.weights if not torch.equal(found.weights[name], start.weights[name])}
    assert {EMBEDDING, "decoder.final_layernorm.weight"} <= moved
    for layer in range(QWEN3["num_hidden_layers"]):
        of = [name for name in start.weights if name.startswith(f"decoder.layers.{layer}.")]
        assert len(of) == 8, "four matrices, four norms"
        for kind in ("self_attention.linear", "mlp.linear", "norm.weight"):
            inside = [name for name in of if kind in name]
            assert len(moved.intersection(inside)) == len(inside) / 2


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", registered(LR, without=WHOLE_MODEL))
def test_other_optimizers_too(folders: dict[Any, str], name: str) -> None:
    job = Job(folder=folders["llama"], steps=3, dtype=torch.float64, optimizer=Optimizer(name=name, lr=LR))
    same(run(job.on(tensor=3, pipeline=2), train), run(job, train), 1e-9)
    job = dataclasses.replace(job, dtype=torch.float32)
    ours, theirs = run(job.on(replicas=2), train), run(job.on(replicas=2, zero1=False), train)
    assert all(torch.equal(ours.weights[weight], theirs.weights[weight]) for weight in theirs.weights)


def stop(job: Job, root: str) -> Outcome:
    """On a rank: do the job's steps and save."""
    with frozen(job) as model:
        trainer = make_trainer(model, job.optimizer)
        outcome = advance(job, trainer)
        checkpoint.save(Path(root), job.steps, trainer, {"iteration": job.steps, "seed": 7})
        return outcome


def go_on(job: Job, root: str) -> Outcome:
    """On a rank: load, and do the job's steps from where it stopped."""
    with frozen(job) as model:
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.fill_(0.5)  # the checkpoint gives every weight
        trainer = make_trainer(model, job.optimizer)
        checkpoint.load(Path(root), trainer)
        return advance(job, trainer)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("before", "after", "dtype"),
    [
        ({"replicas": 2}, {"replicas": 2}, torch.bfloat16),
        ({"replicas": 2, "zero1": False}, {"replicas": 2, "zero1": False}, torch.bfloat16),
        ({"tensor": 2, "pipeline": 2}, {"pipeline": 4}, torch.float32),
        ({"pipeline": 2, "replicas": 2}, {"tensor": 4}, torch.float32),
        ({"tensor": 2, "zero1": False}, {"pipeline": 4, "zero1": False}, torch.float32),
    ],
    ids=str,
)
def test_a_run_goes_on(
    folders: dict[Any, str], tmp_path: Path, before: dict[str, Any], after: dict[str, Any], dtype: torch.dtype
) -> None:
    job = Job(folder=folders[True], steps=2 * HALF, dtype=dtype)
    first = run(dataclasses.replace(job, steps=HALF).on(**before), stop, str(tmp_path))
    second = run(dataclasses.replace(job, first=HALF, steps=HALF).on(**after), go_on, str(tmp_path))
    resumed = Whole([*first.steps, *second.steps], second.weights)
    if before == after:
        straight = run(job.on(**before), train)
        assert resumed.steps == straight.steps
        assert all(torch.equal(resumed.weights[name], straight.weights[name]) for name in straight.weights)
    else:
        same(resumed, truth(folders, "restricted", True))


def refusal(job: Job, root: str, share: float, seed: int) -> str:
    """On a rank: what loading says."""
    try:
        with frozen(job, share, seed) as model:
            checkpoint.load(Path(root), make_trainer(model, job.optimizer))
    except (CheckpointError, LayoutError, ConfigError) as err:
        return str(err)
    return "loaded"


def test_another_choice_is_refused(folders: dict[Any, str], tmp_path: Path) -> None:
    run(Job(folder=folders[True], steps=1), stop, str(tmp_path))
    for share, seed in [(0.25, SEED), (0.5, SEED + 1)]:
        (said,) = fresh(1, refusal, Job(folder=folders[True]), str(tmp_path), share, seed)
        assert (
            f"(train.freeze_share, seed)=[0.5, {SEED}], this run has (train.freeze_share, seed)=[{share}, {seed}]"
            in said
        )


def test_a_stage_with_nothing_to_train_is_refused(folders: dict[Any, str]) -> None:
    job = Job(folder=folders[True]).on(pipeline=4)
    said = fresh(4, refusal, job, "", 0.999, SEED)
    assert all("train.freeze_share=0.999 leaves rank 2 nothing to train; lower it" in line for line in said)
    qk = dataclasses.replace(Job(folder=folders[True]), optimizer=Optimizer(name="muonclip"))
    assert (
        "adapter.rank or train.freeze_share freezes some of them; use another optimizer"
        in fresh(1, refusal, qk, "", 0.5, SEED)[0]
    )


def buffers(job: Job) -> tuple[int, int, int]:
    """On a rank: trained elements, elements of gradient buffers, and of state; a tied head goes with its embedding."""
    with frozen(job) as model:
        trainer = make_trainer(model, job.optimizer)
        advance(job, trainer)
        assert all(p.requires_grad for name, _, p in model.parameters() if name in (OUTPUT, EMBEDDING))
        state = sum(tensor.numel() for held in trainer.inner.state.values() for tensor in held.values())
        trained = sum(p.numel() for p in model.module.parameters() if p.requires_grad)
        return trained, sum(buffer.numel for buffer in trainer.wrapped.buffers), state


def test_what_is_frozen_has_neither_gradient_nor_state(folders: dict[Any, str]) -> None:
    for trained, grads, state in fresh(2, buffers, Job(folder=folders[True], steps=1).on(pipeline=2, zero1=False)):
        assert grads == trained and state == 2 * trained
