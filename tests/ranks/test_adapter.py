"""LoRA adapters on every layout against one process; resumed, resharded, merged; and the reductions that make it so."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import LR, Job, Outcome, Whole, advance, batch_of, opened, run, same
from models import LLAMA, QWEN3, tied_and_untied, value, write_folder
from optimizer_cases import WHOLE_MODEL, registered
from pool import fresh
from torch import Tensor

from megatron_replay.config import Adapter, Layout, Optimizer, RunConfig
from megatron_replay.device import CPU
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.models.lora import A, B
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import merge, shard
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.parallel.mcore.lora_layers import attach
from megatron_replay.parallel.mcore.model import Model, build, squared_distance
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.trainer import make_trainer
from megatron_replay.stages.convert import run as convert

SMALL = {**QWEN3, "num_hidden_layers": 2}
FOUR = Adapter(rank=4, alpha=8.0)
ATTENTION = Adapter(rank=3, alpha=6.0, targets=("linear_proj", "linear_qkv"))
SEED = 11
TRUTHS: dict[Any, Whole] = {}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, str]:
    root = tmp_path_factory.mktemp("adapted")
    return {**tied_and_untied(root, SMALL), "llama": str(write_folder(root / "llama", LLAMA))}


@contextmanager
def adapted(job: Job, adapter: Adapter) -> Iterator[Model]:
    """A filled model with an adapter whose B is not zero any more: else A's first gradient would be."""
    with opened(job.folder, job.layout, job.dtype) as model:
        attach(model, adapter, SEED)
        with torch.no_grad():
            for name, factor, parameter in model.parameters():
                if name.endswith(B):
                    part = merge(factor, {name: value(name, factor.hf_shapes[0])})
                    parameter.copy_(shard(part, factor.axis, model.world.tensor_rank, model.world.tensor_size))
        yield model


def train(job: Job, adapter: Adapter) -> Outcome:
    with adapted(job, adapter) as model:
        return advance(job, make_trainer(model, job.optimizer))


def truth(folders: dict[Any, str], loss: str, model: Any) -> Whole:
    if (loss, model) not in TRUTHS:
        TRUTHS[loss, model] = run(Job(folder=folders[model], loss=loss), train, FOUR)
    return TRUTHS[loss, model]


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("loss", "tied", "layout"),
    [
        ("restricted", True, {"tensor": 2}),
        ("restricted", True, {"tensor": 4, "sequence_parallel": True, "recompute": "selective"}),
        ("restricted", True, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
        ("restricted", True, {"recompute": "full"}),
        ("restricted", False, {"replicas": 2, "zero1": False}),
        ("restricted", False, {"pipeline": 2, "replicas": 2}),
        ("full", True, {"tensor": 2, "replicas": 2}),
        ("full", False, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"}),
    ],
    ids=str,
)
def test_ten_steps_are_those_of_one_process(
    folders: dict[Any, str], loss: str, tied: bool, layout: dict[str, Any]
) -> None:
    same(run(Job(folder=folders[tied], loss=loss).on(**layout), train, FOUR), truth(folders, loss, tied))


def test_what_is_compared_is_not_trivial(folders: dict[Any, str]) -> None:
    """Every factor moves, and nothing else does."""
    found = truth(folders, "restricted", True)
    start = run(Job(folder=folders[True], steps=0), train, FOUR)
    moved = {name: float((found.weights[name] - start.weights[name]).abs().max()) for name in start.weights}
    assert min(moved[name] for name in moved if name.endswith((A, B))) > LR
    assert max(moved[name] for name in moved if not name.endswith((A, B))) == 0
    assert sum(name.endswith((A, B)) for name in moved) == 2 * 4 * SMALL["num_hidden_layers"]


@pytest.mark.matrix(1)
@pytest.mark.parametrize("name", registered(LR, without=WHOLE_MODEL))
def test_other_optimizers_train_adapters_too(folders: dict[Any, str], name: str) -> None:
    """In float64, as in test_optimizers: a sign or a threshold turns a rounding error of float32 into a whole step of
    one weight."""
    job = Job(folder=folders["llama"], steps=3, dtype=torch.float64, optimizer=Optimizer(name=name, lr=LR))
    same(run(job.on(tensor=3, sequence_parallel=True), train, FOUR), run(job, train, FOUR), 1e-9)
    assert_bits(run(job.on(replicas=2), train, FOUR), run(job.on(replicas=2, zero1=False), train, FOUR))


def assert_bits(ours: Whole, theirs: Whole) -> None:
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in theirs.weights)


def padding(job: Job, adapter: Adapter) -> tuple[list[float], float]:
    """On a rank: losses of a run, and the sum of what stands in the factors' padding after it."""
    with adapted(job, adapter) as model:
        outcome = advance(job, make_trainer(model, job.optimizer))
        real = {weight.name: weight.hf_shapes[0] for weight in model.table}
        held = {name: parameter for name, _, parameter in model.parameters()}
        beyond = [0.0]
        for name, parameter in held.items():
            if name.endswith(f"linear_qkv.{B}"):
                beyond.append(float(parameter[real[name][0] :].abs().sum()))
            if name.endswith(f"linear_proj.{A}"):
                beyond.append(float(parameter[:, real[name][1] :].abs().sum()))
        assert len(beyond) == 1 + 2 * model.spec.num_layers
        return [step.loss for step in outcome.steps], max(beyond)


@pytest.mark.parametrize("name", ["moclip", "muon"])
def test_padded_heads_change_nothing_and_stay_zero(folders: dict[Any, str], name: str) -> None:
    job = Job(folder=folders["llama"], dtype=torch.float64, optimizer=Optimizer(name=name, lr=LR), steps=6)
    plain, _ = padding_of(job)
    found, beyond = padding_of(dataclasses.replace(job, layout=Layout(head_multiple=4)))
    assert found == pytest.approx(plain, rel=1e-9) and beyond == 0.0
    same(run(job.on(tensor=4, head_multiple=4), train, FOUR), run(job.on(head_multiple=4), train, FOUR), 1e-9)


def padding_of(job: Job) -> tuple[list[float], float]:
    return tuple(fresh(1, padding, job, FOUR)[0])  # type: ignore[return-value]


HALF = 3


def stop(job: Job, adapter: Adapter, root: str) -> Outcome:
    """On a rank: do the job's steps and save as `train` does."""
    with adapted(job, adapter) as model:
        trainer = make_trainer(model, job.optimizer)
        outcome = advance(job, trainer)
        if model.world.is_main:
            facts = {
                "head_multiple": job.layout.head_multiple,
                "dtype": "float32",
                "adapter": checkpoint.adapter_facts(model.table.adapter),
            }
            checkpoint.write_side_files(Path(root), Path(job.folder), facts)
        checkpoint.save(Path(root), job.first + job.steps, trainer, {"iteration": job.first + job.steps, "seed": 7})
        return outcome


def go_on(job: Job, adapter: Adapter, root: str) -> Outcome:
    """On a rank: load, and do the job's steps from where it stopped."""
    with opened(job.folder, job.layout, job.dtype) as model:
        attach(model, adapter, SEED + 1)
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.fill_(0.5)  # the checkpoint gives every weight
        trainer = make_trainer(model, job.optimizer)
        checkpoint.load(Path(root), trainer)
        return advance(job, trainer)


@pytest.mark.matrix(1)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2}),
        ({"replicas": 2, "zero1": False}, {"replicas": 2, "zero1": False}),
        ({"tensor": 2, "pipeline": 2}, {"tensor": 4}),
        ({"tensor": 4, "sequence_parallel": True}, {"pipeline": 2, "replicas": 2}),
        ({"tensor": 2, "zero1": False}, {"pipeline": 2, "zero1": False}),
    ],
    ids=str,
)
def test_a_run_goes_on_on_any_layout(
    folders: dict[Any, str], tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> None:
    job = Job(folder=folders[True], steps=2 * HALF)
    first = run(dataclasses.replace(job, steps=HALF).on(**before), stop, FOUR, str(tmp_path))
    second = run(dataclasses.replace(job, first=HALF, steps=HALF).on(**after), go_on, FOUR, str(tmp_path))
    resumed = Whole([*first.steps, *second.steps], second.weights)
    if before == after:
        straight = run(job.on(**before), train, FOUR)
        assert resumed.steps == straight.steps
        assert_bits(resumed, straight)
    else:
        same(resumed, run(job, train, FOUR))


def refusal(job: Job, adapter: Adapter | None, root: str) -> str:
    """On a rank: what loading says."""
    try:
        with opened(job.folder, job.layout, job.dtype) as model:
            if adapter is not None:
                attach(model, adapter, SEED)
            checkpoint.load(Path(root), make_trainer(model, job.optimizer))
    except CheckpointError as err:
        return str(err)
    return "loaded"


@pytest.fixture(scope="module")
def saved(folders: dict[Any, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of TP2 x PP2 after three steps."""
    root = tmp_path_factory.mktemp("saved")
    run(Job(folder=folders[True], steps=HALF).on(tensor=2, pipeline=2), stop, FOUR, str(root))
    return root


@pytest.mark.parametrize(
    "other", [None, dataclasses.replace(FOUR, rank=8), ATTENTION, dataclasses.replace(FOUR, alpha=16.0)], ids=str
)
def test_another_adapter_is_refused(folders: dict[Any, str], saved: Path, other: Adapter | None) -> None:
    (said,) = fresh(1, refusal, Job(folder=folders[True]), other, str(saved))
    assert (
        "was written with adapter={'rank': 4, 'alpha': 8.0" in said
        and "resume with the same setting" in said
        and "\n" not in said
    )


def logits(model: Model) -> np.ndarray:
    """Logits of a batch, [N, V]: only without tensor parallelism."""
    (batch,) = batch_of(model, 0, 4)
    found: list[Tensor] = []
    forward(model, [batch], lambda _, hidden, weight: hidden @ weight.t(), consume=lambda _, out: found.append(out))
    return found[0].double().numpy()


def unmerged(job: Job, adapter: Adapter, root: str) -> tuple[np.ndarray, tuple[float, float]]:
    """On a rank: logits of the model with the adapter beside it, as it was trained, and its distance from the base."""
    with opened(job.folder, job.layout, job.dtype) as model:
        attach(model, adapter, SEED)
        checkpoint.load(Path(root), make_trainer(model, job.optimizer))
        return logits(model), squared_distance(model, HFFolder(job.folder))


def filled(path: str, base: str, layout: Layout) -> tuple[np.ndarray | None, tuple[float, float], int]:
    """On a rank: (logits, distance from the base, number of parameters) of a model as `evaluate` would see it."""
    with world.running(layout, CPU) as ours:
        source = Source.open(path)
        model = build(source.spec, source.layout(layout), ours, torch.float32, seq_length=128)
        source.fill(model)
        alone = ours.size == 1
        return logits(model) if alone else None, squared_distance(model, HFFolder(base)), len(list(model.parameters()))


@pytest.mark.matrix(1)
@pytest.mark.parametrize("model", [True, "llama"], ids=["qwen3", "llama, padded heads"])
def test_merged_it_is_the_model_that_was_trained(folders: dict[Any, str], tmp_path: Path, model: Any) -> None:
    """The model is filled as `evaluate` fills it, on one rank and four, and as `convert` exports it."""
    layout = {"tensor": 2, "pipeline": 2, "head_multiple": 2}
    root, exported = tmp_path / "root", tmp_path / "hf"
    job = Job(folder=folders[model], steps=HALF)
    run(job.on(**layout), stop, FOUR, str(root))
    ((truth_, distance),) = fresh(1, unmerged, job.on(head_multiple=2), FOUR, str(root))
    base = fresh(1, filled, folders[model], folders[model], Layout())[0]
    assert np.abs(truth_ - base[0]).max() > 0.1, "the adapter says something"

    ((merged_, merged_distance, count),) = fresh(1, filled, str(root), folders[model], Layout())
    assert np.abs(merged_ - truth_).max() < 1e-5 * np.abs(truth_).max() and count == base[2]
    assert merged_distance == pytest.approx(distance, rel=1e-6) and merged_distance[0] > 0
    for _, distance_, _ in fresh(4, filled, str(root), folders[model], Layout(tensor=2, pipeline=2)):
        assert distance_ == pytest.approx(distance, rel=1e-6)

    fresh(1, convert_verified, str(root), str(exported))
    ((back, back_distance, _),) = fresh(1, filled, str(exported), folders[model], Layout())
    assert np.abs(back - merged_).max() < 1e-6 * np.abs(truth_).max() and back_distance == pytest.approx(
        distance, rel=1e-6
    )
    assert not (exported / "source.json").exists()


def convert_verified(given: str, made: str) -> None:
    convert(RunConfig(), given, made, verify=True)


def test_a_checkpoint_whose_adapter_is_not_described_is_refused(saved: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(saved, tmp_path / "root"))
    facts = json.loads((root / "hf" / "source.json").read_text())
    assert facts["adapter"] == {
        "rank": 4,
        "alpha": 8.0,
        "targets": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    }
    (root / "hf" / "source.json").write_text(json.dumps({**facts, "adapter": None}))
    with pytest.raises(
        CheckpointError, match=r"holds an adapter that .*source\.json does not describe; restore that file"
    ):
        _ = Source(root).adapter
    (root / "hf" / "source.json").write_text(json.dumps({**facts, "adapter": {"rank": 8}}))
    with pytest.raises(CheckpointError, match=r"lora_a' is \[2, 4, 48\], expected \[2, 8, 48\]"):
        convert(RunConfig(), str(root), str(tmp_path / "out"))


def buffers(job: Job, adapter: Adapter) -> tuple[int, int]:
    """On a rank: elements of gradient buffers and of optimizer state; checks what needs a gradient."""
    with adapted(job, adapter) as model:
        trainer = make_trainer(model, job.optimizer)
        advance(job, trainer)
        assert all(parameter.requires_grad == name.endswith((A, B)) for name, _, parameter in model.parameters())
        state = sum(tensor.numel() for held in trainer.inner.state.values() for tensor in held.values())
        return sum(buffer.numel for buffer in trainer.wrapped.buffers), state


def test_what_is_frozen_has_neither_gradient_nor_state(folders: dict[Any, str]) -> None:
    spec = ModelSpec.from_hf(SMALL)
    size = sum(int(np.prod(factor.shape)) for factor in WeightTable(spec, adapter=ATTENTION).factors)
    assert fresh(1, buffers, Job(folder=folders[False], steps=1).on(zero1=False), ATTENTION) == [(size, 2 * size)]


def identity(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
    return tensor


def mutated(job: Job, what: str) -> list[float]:
    """On a rank: the gradient norms of the job with one reduction missing."""
    from megatron.core.tensor_parallel import mappings

    if what == "parts of du are not summed":
        mappings.copy_to_tensor_model_parallel_region = identity
    if what == "parts of u are not summed":
        mappings.reduce_from_tensor_model_parallel_region = identity
    with adapted(job, FOUR) as model:
        if what == "gradients of a rank's tokens are not summed":
            for parameter in model.module.parameters():
                parameter.sequence_parallel = parameter.dim() == 1
        return [step.grad_norm for step in advance(job, make_trainer(model, job.optimizer)).steps]


@pytest.mark.parametrize(
    ("what", "layout"),
    [
        ("parts of du are not summed", {"tensor": 2}),
        ("parts of u are not summed", {"tensor": 2}),
        ("gradients of a rank's tokens are not summed", {"tensor": 2, "sequence_parallel": True}),
    ],
    ids=str,
)
def test_a_missing_reduction_would_be_seen(folders: dict[Any, str], what: str, layout: dict[str, Any]) -> None:
    job = Job(folder=folders[True], steps=1)
    (right,) = truth(folders, "restricted", True).norms[:1]
    for (wrong,) in fresh(job.on(**layout).ranks, mutated, job.on(**layout), what):
        assert abs(wrong / right - 1) > 1e-4


def refusals(job: Job) -> None:
    with opened(job.folder, job.layout) as model:
        with pytest.raises(
            ConfigError, match=r"adapter\.rank=65 is too large: linear_proj is \[48, 64\]; give at most 48"
        ):
            attach(model, Adapter(rank=65, targets=("linear_proj",)), SEED)
        attach(model, FOUR, SEED)
        with pytest.raises(ConfigError, match=r"muonclip' scales attention's weights .* use another optimizer"):
            make_trainer(model, Optimizer(name="muonclip"))


def test_what_cannot_work_is_refused(folders: dict[Any, str]) -> None:
    fresh(1, refusals, Job(folder=folders[True]))
