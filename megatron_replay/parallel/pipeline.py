"""Run micro-batches through all pipeline stages, forward only or forward and backward, by megatron's own schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_replay.parallel.batch import MicroBatch, Task
from megatron_replay.parallel.mcore.attention import pack
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.parallel.timers import Timers


def forward(
    model: Model, batches: Sequence[MicroBatch], task: Task, *, consume: Callable[[MicroBatch, Tensor], None]
) -> None:
    """Run micro-batches forward only.

    On the last stage `consume(batch, task result [N, ...])` is called once a micro-batch, in order.
    """
    model.module.eval()

    def finish(batch: MicroBatch, out: Tensor) -> Any:
        consume(batch, out)
        return torch.zeros((), device=out.device), {}

    with torch.no_grad():
        _schedule(model, model.module, batches, task, finish, forward_only=True)


def forward_backward(
    model: Model, wrapped: Any, batches: Sequence[MicroBatch], task: Task, timers: Timers
) -> dict[str, tuple[float, int]]:
    """Forward and backward of this replica's micro-batches; the task returns the losses [N], each times its scale.

    Gradients end up in the wrapped model's buffers, divided by the number of positions in the whole global batch.
    Returns (sum of losses, positions) of this replica for each name among the terms; zeros before the last stage.
    """
    wrapped.train()
    sums: dict[str, list[tuple[Tensor, int]]] = {part.name: [] for batch in batches for part in batch.parts()}

    def timed(batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        with timers.phase("head"):
            return task(batch, hidden, weight)

    def finish(batch: MicroBatch, out: Tensor) -> Any:
        with timers.phase("loss"):
            total = out.sum()
            for part in batch.parts():
                losses = out[part.rows]
                # a tensor of its own, because megatron divides the one it gets in place
                own = total.detach().clone() if losses.numel() == out.numel() else losses.detach().sum()
                sums[part.name].append((own / part.scale, losses.numel()))
            count = torch.tensor(out.numel(), dtype=torch.int, device=out.device)
        return total, count, {}

    _schedule(model, wrapped, batches, timed, finish, forward_only=False)
    return {
        name: (float(sum(float(total) for total, _ in parts)), sum(count for _, count in parts))
        for name, parts in sums.items()
    }


def _schedule(
    model: Model, module: Any, batches: Sequence[MicroBatch], task: Task, finish: Any, *, forward_only: bool
) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def step(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        model.module.rotary_pos_emb.positions = batch.position_ids
        if model.head is not None:
            model.head.task, model.head.batch = task, batch
        out = chunk(model.rows_of(batch.tokens), batch.position_ids, pack(batch.segments, batch.rows))
        return out, lambda result: finish(batch, result[0])

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[module],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )
