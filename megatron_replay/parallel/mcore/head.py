"""The output layer that never builds the logits of the batch: it hands hidden states and its weight to a task.

megatron's GPTModel calls its output layer once, at the end of the last stage, with the hidden states of the positions
that count (`parallel.mcore.last_layer_rows`). Ours calls task(batch, hidden [N, H], weight [V_local, H]). The task (a
loss, a selection, the logits of a few rows) returns one value a position or more. Name, sharding, tied weight and
checkpoint layout are those of megatron's layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def install(model: Any) -> Any:
    """Make the output layer of a last-stage GPTModel ours; returns it.

    The class is changed in place, so every version's constructor stays megatron's.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    class TaskHead(ColumnParallelLinear):
        task: Callable[[Any, Tensor, Tensor], Tensor]
        """`parallel.batch.Task`."""
        batch: Any
        """The `parallel.batch.MicroBatch` that comes next."""

        def forward(self, input_: Tensor, weight: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
            """input_ [N^, 1, H] (or this rank's part of N^) -> (task's result [N, ...] as [N, 1, ...], None).

            N^ is N, the batch's positions, rounded up to what sequence parallelism divides.
            """
            if self.sequence_parallel:  # backward: reduce-scatter
                hidden = gather_from_sequence_parallel_region(input_, tensor_parallel_output_grad=True)
            else:  # backward: all-reduce; the tasks give each rank's part of the gradient
                hidden = copy_to_tensor_model_parallel_region(input_)
            count = len(self.batch.rows)
            out = self.task(self.batch, hidden[:count, 0], self.weight if weight is None else weight)
            return out.unsqueeze(1), None

    model.output_layer.__class__ = TaskHead
    return model.output_layer
