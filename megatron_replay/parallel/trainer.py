"""One optimizer step of a sharded model: zero, forward and backward through the pipeline, reduce, update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_replay.config import Optimizer as OptimizerConfig
from megatron_replay.optim import ReplayOptimizer
from megatron_replay.parallel.batch import DOMAIN, MicroBatch, Task
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.parallel.mcore.optimizer import set_rates, wrap
from megatron_replay.parallel.pipeline import forward_backward
from megatron_replay.parallel.timers import PHASES, Timers


@dataclass(frozen=True)
class StepResult:
    """The result of a step, the same on every rank."""

    loss: float
    """Mean loss over the domain's positions of the global batch."""
    positions: int
    grad_norm: float
    """The gradient norm before clipping."""
    applied: bool
    """False: the gradient was not finite and nothing was changed."""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    """Seconds of each phase (`timers.PHASES`) of the step, on the rank where it took longest."""


@dataclass
class Trainer:
    model: Model
    wrapped: Any
    """megatron's DistributedDataParallel around the model."""
    outer: Any
    """megatron's optimizer wrapper."""
    inner: ReplayOptimizer
    weight_decay: float
    timers: Timers

    def step(self, batches: Sequence[MicroBatch], task: Task, lr: float) -> StepResult:
        """One update from this replica's micro-batches; the task returns the losses [N] of each."""
        with self.timers.phase("optimizer"):
            self.wrapped.zero_grad_buffer()
            self.outer.zero_grad()
        sums = forward_backward(self.model, self.wrapped, batches, task, self.timers)
        with self.timers.phase("optimizer"):
            set_rates(self.inner, lr, self.weight_decay)
            self.outer.step()
        means, seconds = self._exchanged(sums)
        loss, positions = means.pop(DOMAIN, (0.0, 0))
        return StepResult(
            loss=loss,
            positions=positions,
            grad_norm=self.inner.grad_norm,
            applied=self.inner.last_step_ok,
            metrics={**self.inner.metrics, **{name: mean for name, (mean, _) in means.items()}},
            seconds=seconds,
        )

    def _exchanged(
        self, sums: Mapping[str, tuple[float, int]]
    ) -> tuple[dict[str, tuple[float, int]], dict[str, float]]:
        """(mean loss, positions) of each term over all replicas, and each phase's seconds on its slowest rank.

        It takes one gather; every rank has terms of the same names.
        """
        world = self.model.world
        ours = [value if world.speaks else 0.0 for name in sorted(sums) for value in sums[name]]
        table = torch.stack(world.gather(torch.tensor([*ours, *self.timers.take()], dtype=torch.float64)))
        totals = table[:, : len(ours)].sum(0).view(-1, 2).tolist()
        means = {
            name: (total / count if count else 0.0, int(count))
            for name, (total, count) in zip(sorted(sums), totals, strict=True)
        }
        slowest = zip(PHASES, table[:, len(ours) :].amax(0).tolist(), strict=True)
        return means, {name: seconds for name, seconds in slowest if seconds}


def make_trainer(model: Model, settings: OptimizerConfig, kernels: str = "auto") -> Trainer:
    """Wrap a filled model for training with the optimizer of the configuration."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    # megatron's ZeRO-1 knows 32- and 16-bit weights only
    zero1 = model.layout.zero1 and model.dtype != torch.float64
    settings_ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.dtype == torch.bfloat16, use_distributed_optimizer=zero1
    )
    wrapped = DistributedDataParallel(model.config, settings_ddp, model.module)
    outer, inner = wrap(model, wrapped, settings, kernels)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.timers = timers = Timers(model.world.device)
    return Trainer(model, wrapped, outer, inner, settings.weight_decay, timers)
