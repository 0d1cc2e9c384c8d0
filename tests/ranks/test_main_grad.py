"""The head's gradient goes straight into megatron's main gradient: the same as autograd's, over micro-batches, ranks
and a tied head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from jobs import Job, Outcome, batch_of, opened, task, whole
from models import QWEN3, write_folder
from pool import fresh
from torch import Tensor

from megatron_replay.config import Optimizer
from megatron_replay.ops import restricted_linear_cross_entropy
from megatron_replay.parallel.batch import MicroBatch, Task
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import forward_backward
from megatron_replay.parallel.trainer import StepResult, make_trainer


def by_autograd(model: Model) -> Task:
    """The restricted loss whose weight gradient is a tensor of its own, handed to autograd."""
    shard = vocab_shard(model)

    def loss(batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        assert batch.sets is not None
        return restricted_linear_cross_entropy(hidden, weight, batch.sets, shard)

    return loss


def gradients(job: Job, direct: bool) -> Outcome:
    """On a rank: every parameter's main gradient after the micro-batches of a step, and again after those of another
    one."""
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        loss = task(model, "restricted") if direct else by_autograd(model)
        for step in (3, 0):  # the second one begins with the first one's gradients in the buffers
            trainer.wrapped.zero_grad_buffer()
            forward_backward(model, trainer.wrapped, batch_of(model, step, job.micro), loss, trainer.timers)
        grads = {
            name: (weight, parameter.main_grad.detach().double().numpy())
            for name, weight, parameter in model.parameters()
        }
        return Outcome([StepResult(0.0, 0, 0.0, True)], model.world.tensor_rank, model.spec.tied, grads)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "layout", [{}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2, "replicas": 2}], ids=str
)
def test_the_head_s_gradient_is_autograd_s(tmp_path: Any, tied: bool, layout: dict[str, Any]) -> None:
    folder = write_folder(tmp_path, {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": tied})
    job = Job(folder=str(folder), dtype=torch.float64).on(**layout, zero1=False)
    direct, autograd = (whole(fresh(job.ranks, gradients, job, way)) for way in (True, False))
    for name, grad in autograd.weights.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(
            direct.weights[name], grad, rtol=1e-10, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}"
        )
