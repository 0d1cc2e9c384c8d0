"""The last layer behind its attention, and every sample behind its last position, are computed only where that counts;
nothing changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ROWS, Job, Outcome, opened, task, whole
from models import LLAMA, QWEN3, draw, write_folder
from pool import fresh
from torch import Tensor

from megatron_replay.config import Optimizer
from megatron_replay.parallel.batch import DOMAIN, MicroBatch, Task, flatten, micro_batches
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.parallel.pipeline import forward, forward_backward
from megatron_replay.parallel.trainer import StepResult, make_trainer

LAYOUTS: list[dict[str, Any]] = [
    {"tensor": 2},
    {"tensor": 2, "sequence_parallel": True, "recompute": "full"},
    {"tensor": 4, "pipeline": 2, "sequence_parallel": True},
    {"pipeline": 2, "recompute": "selective"},
    {"replicas": 2, "recompute": "full"},
]


def samples_of(index: int, vocab: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Three samples of a row, and a few positions of each: one in the middle, two near the end, none."""
    ids = [draw(20 + 3 * i + index, vocab, "narrow", index, i) for i in range(3)]
    return ids, [np.array([5 + index]), np.array([len(ids[1]) - 4, len(ids[1]) - 2]), np.zeros(0, dtype=np.int64)]


def parts_of(model: Model, micro: int) -> tuple[list[list[np.ndarray]], list[list[np.ndarray]]]:
    """Samples and positions of this replica's part of four rows, by micro-batch."""
    each = ROWS // model.world.data_size
    first = model.world.data_rank * each
    rows = [samples_of(i, model.spec.vocab_size) for i in range(first, first + each)]
    parts = [rows[i : i + micro] for i in range(0, each, micro)]
    ids, chosen = ([[sample for row in part for sample in row[k]] for part in parts] for k in (0, 1))
    return ids, chosen


def batches_of(model: Model, micro: int) -> list[MicroBatch]:
    """Samples cut behind their last position, and only the positions that count in the last layer."""
    ours = model.world
    return micro_batches(*parts_of(model, micro), ours.torch_device, multiple=ours.tensor_size, share_prefixes=False)


def whole_batches(model: Model, micro: int) -> dict[MicroBatch, Tensor]:
    """Whole samples, every position of which goes through all of the last layer; and which of them count."""
    found = {}
    for some, wanted in zip(*parts_of(model, micro), strict=True):
        counts = torch.cat(
            [torch.isin(torch.arange(len(s) - 1), torch.from_numpy(at)) for s, at in zip(some, wanted, strict=True)]
        )
        everything = [np.arange(len(sample) - 1) for sample in some]
        found[flatten(some, everything, 4 * 32 * micro, model.world.torch_device)] = counts
    return found


def masked(loss: Task, counts: dict[MicroBatch, Tensor]) -> Task:
    """The losses of the positions that count, of those that went through the layer."""
    return lambda batch, hidden, weight: loss(batch, hidden, weight)[counts[batch].to(hidden.device)]


def gradients(job: Job, select: bool) -> Outcome:
    """On a rank: the sum of the losses that count, and its gradients."""
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        trainer.wrapped.zero_grad_buffer()
        loss: Task = task(model, "full")
        if select:
            batches = batches_of(model, job.micro)
        else:
            counts = whole_batches(model, job.micro)
            batches, loss = list(counts), masked(loss, counts)
        sums = forward_backward(model, trainer.wrapped, batches, loss, trainer.timers)
        total, count = model.world.total(*sums[DOMAIN])
        assert int(count) == 12
        grads = {
            name: (weight, parameter.main_grad.detach().double().numpy())
            for name, weight, parameter in model.parameters()
        }
        return Outcome([StepResult(total, 12, 0.0, True)], model.world.tensor_rank, model.spec.tied, grads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        write_folder(
            tmp_path_factory.mktemp("tiny") / "model", {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": False}
        )
    )


@pytest.fixture(scope="module")
def truth(folder: str) -> Any:
    return whole(fresh(1, gradients, Job(folder=folder, dtype=torch.float64), False))


@pytest.mark.parametrize("layout", [{}, *LAYOUTS], ids=str)
def test_losses_and_gradients_are_those_of_the_whole_layer(folder: str, truth: Any, layout: dict[str, Any]) -> None:
    job = Job(folder=folder, dtype=torch.float64)
    job = job.on(**layout, zero1=False) if layout else job
    ours = whole(fresh(job.ranks, gradients, job, True))
    assert ours.losses == pytest.approx(truth.losses, rel=1e-12)
    assert ours.weights.keys() == truth.weights.keys()
    for name, grad in truth.weights.items():
        torch.testing.assert_close(ours.weights[name], grad, rtol=1e-10, atol=1e-12)


def rows_seen(job: Job) -> tuple[list[int], list[int], int]:
    """On a rank: rows that each layer's MLP and output projection got, and the length of the flat row."""
    mlp: list[int] = []
    projection: list[int] = []

    def note(rows: list[int]) -> Callable[..., None]:
        return lambda module, inputs: rows.append(inputs[0].shape[0])

    with opened(job.folder, job.layout, job.dtype) as model:
        for layer in model.module.decoder.layers:
            layer.mlp.register_forward_pre_hook(note(mlp))
            layer.self_attention.linear_proj.register_forward_pre_hook(note(projection))
        batches = batches_of(model, ROWS)
        forward(model, batches, task(model, "full"), consume=lambda batch, out: None)
        return mlp, projection, batches[0].tokens.shape[1]


def test_the_last_layer_gets_only_the_rows_that_count(folder: str) -> None:
    mlp, projection, length = fresh(1, rows_seen, Job(folder=folder))[0]
    assert mlp == projection == [length, 12]
    # each sample up to its last position, the one without left out
    assert length == sum(6 + index + 22 + index for index in range(4))
    job = dataclasses.replace(
        Job(folder=folder), layout=dataclasses.replace(Job(folder=folder).layout, tensor=4, sequence_parallel=True)
    )
    mlp, projection, length = fresh(4, rows_seen, job)[0]
    # the projection's input is whole, its output is scattered
    assert (mlp, projection) == ([length // 4, 3], [length, 12])


def nothing_counts(job: Job) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def keep(batch: MicroBatch, out: Tensor) -> None:
        shapes.append(tuple(out.shape))

    with opened(job.folder, job.layout, job.dtype) as model:
        none = np.zeros(0, dtype=np.int64)
        ids = [
            [draw(9, model.spec.vocab_size, "a"), draw(5, model.spec.vocab_size, "b")],
            [draw(7, model.spec.vocab_size, "c")],
        ]
        for positions in ([[none, np.array([3])], [none]], [[none, none], [none]]):
            batches = micro_batches(
                ids, positions, model.world.torch_device, multiple=model.world.tensor_size, share_prefixes=False
            )
            forward(model, batches, task(model, "full"), consume=keep)
    return shapes


@pytest.mark.parametrize("layout", [{}, {"tensor": 3, "sequence_parallel": True}], ids=str)
def test_a_micro_batch_in_which_nothing_counts(tmp_path: Path, layout: dict[str, Any]) -> None:
    job = Job(folder=str(write_folder(tmp_path / "llama", LLAMA)))
    job = job.on(**layout) if layout else job
    assert fresh(job.ranks, nothing_counts, job)[0] == [(1,), (0,), (0,), (0,)]
