"""The last layer computes only the rows that count.

Behind its attention each position stands alone. So its output projection, its MLP and the final norm see the positions
whose hidden state goes to the head, and no others. This is exact: the rows left out reach neither the loss nor a
gradient. T positions of a flat row, N of them count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LastLayerRows:
    """Selects the rows that count, at the output of a layer's attention and in the residual that is added to it."""

    def __init__(self, layer: Any) -> None:
        from megatron.core import parallel_state

        self._ranks = parallel_state.get_tensor_model_parallel_world_size()
        self._scattered = bool(layer.config.sequence_parallel)
        self._rows: Tensor | None = None
        layer.self_attention.core_attention.select_rows = self.attention
        layer.self_attn_bda = self.bias_dropout_add

    def attention(self, out: Tensor, rows: Tensor) -> Tensor:
        """[T, 1, Hq D] and the rows that count [N] -> [N^, 1, Hq D].

        N^ >= 1 is N rounded up so that sequence parallelism divides it.
        """
        padded = max(len(rows), 1)
        padded += -padded % self._ranks
        self._rows = torch.nn.functional.pad(rows, (0, padded - len(rows))).to(out.device)
        return out.index_select(0, self._rows)

    def bias_dropout_add(self, training: bool, fused: bool) -> Any:
        """megatron's factory of the sum of a sublayer and its residual; no model here has biases or dropout."""
        return self._add

    def _add(self, output: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        from megatron.core.tensor_parallel.mappings import (
            gather_from_sequence_parallel_region,
            scatter_to_sequence_parallel_region,
        )

        rows, self._rows = self._rows, None
        assert rows is not None, "the layer's own attention came before"
        if self._scattered:  # a row that counts may lie on another rank than its index in N^
            whole = gather_from_sequence_parallel_region(residual, tensor_parallel_output_grad=False)
            residual = scatter_to_sequence_parallel_region(whole.index_select(0, rows))
        else:
            residual = residual.index_select(0, rows)
        return output[0] + residual
