"""LoRA adapters beside a model's parallel linears: trained sharded like their matrices, merged for use.

T tokens in the flat micro-batch (T / tensor ranks here under sequence parallelism), r rank. The tensor ranks exchange
[T, r]:

- cut by rows: u = A x is computed alike on every rank. Each rank's rows of B give a part of du, summed in the backward
  pass. Under sequence parallelism A sees a rank's own tokens only: u is gathered, and A's gradient summed over the
  tensor group when it is finished.
- cut by columns: A's columns give a part of u, summed in the forward pass, and B is applied alike on every rank. Under
  sequence parallelism the sum is scattered over the tokens, and B's gradient summed like A's above.
"""

from __future__ import annotations

import inspect
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_replay.config import Adapter
from megatron_replay.formats.torch_dist import Reader
from megatron_replay.models.lora import A, B, check, initial, merged, scale
from megatron_replay.models.weights import merge, shard
from megatron_replay.parallel.mcore.model import Model


@torch.no_grad()
def attach(model: Model, adapter: Adapter, seed: int) -> None:
    """Freeze a filled model and put factors beside the matrices the adapter names.

    It must be called before the model is wrapped for training. Raises ConfigError for a rank that is too large for the
    model.
    """
    check(adapter, model.table)
    model.freeze([weight.name for weight in model.table])
    model.table = model.table.with_adapter(adapter)
    by_rows, by_columns = _classes()
    for _, weight, parameter in list(model.parameters()):
        factors = model.table.factors_of(weight)
        if factors is None:
            continue
        linear = _owner(model, parameter)
        for word, factor in zip((A, B), factors, strict=True):
            whole = merge(factor, {factor.name: initial(factor, seed)})
            part = shard(whole, factor.axis, model.world.tensor_rank, model.world.tensor_size)
            made: Any = torch.nn.Parameter(part.to(parameter.device, parameter.dtype, copy=True))
            made.sequence_parallel = model.config.sequence_parallel and factor.axis is None
            linear.register_parameter(word, made)
        linear.scale, linear.halves = scale(adapter), weight.axis == "gate_up"
        linear.__class__ = by_columns if weight.axis == 1 else by_rows
    if model.world.first_stage and model.layout.recompute == "full":
        # a recomputed layer whose input needs no gradient gives none to what is in it
        model.module.embedding.register_forward_hook(_needs_gradient)


@torch.no_grad()
def merge_into(model: Model, reader: Reader, adapter: Adapter) -> None:
    """Add a checkpoint's adapter to this rank's matrices, one at a time; the model then has no adapter."""
    table, world = model.table.with_adapter(adapter), model.world
    for _, weight, parameter in model.parameters():
        factors = table.factors_of(weight)
        if factors is not None:
            a, b = (shard(reader.read(factor), factor.axis, world.tensor_rank, world.tensor_size) for factor in factors)
            parameter.copy_(merged(parameter, a.to(parameter.device), b.to(parameter.device), adapter))


def _owner(model: Model, parameter: Tensor) -> Any:
    """The module a weight belongs to."""
    path = next(name for name, known in model.module.named_parameters() if known is parameter)
    return reduce(getattr, path.split(".")[:-1], model.module)


def _needs_gradient(_: Any, __: Any, out: Tensor) -> Tensor:
    return out.requires_grad_() if torch.is_grad_enabled() else out


def _classes() -> tuple[type, type]:
    """The linears cut by rows and by columns with an adapter; classes built late: their bases are megatron's."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.mappings import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    class AdaptedRows(ColumnParallelLinear):
        """megatron calls it column-parallel, after the transposed matrix. Other methods stay megatron's."""

        def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            """input_ [T, 1, in] -> ([T, 1, out here], no bias)."""
            out, bias = super().forward(input_, *args, **kwargs)
            low = F.linear(input_, self.lora_a)
            spread = (
                gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
            )
            return torch.add(out, F.linear(spread(low), self.lora_b), alpha=self.scale), bias

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            return _sharded(self, prefix, sharded_offsets, metadata, {"weight": 0, "bias": 0, B: 0})

    class AdaptedColumns(RowParallelLinear):
        """megatron calls it row-parallel."""

        def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
            """input_ [T, 1, in here] -> ([T, 1, out], no bias)."""
            out, bias = super().forward(input_)
            low = F.linear(input_, self.lora_a)
            total = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            return torch.add(out, F.linear(total(low), self.lora_b), alpha=self.scale), bias

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            return _sharded(self, prefix, sharded_offsets, metadata, {"weight": 1, A: 1})

    return AdaptedRows, AdaptedColumns


def _sharded(linear: Any, prefix: str, offsets: Any, metadata: Any, axes: dict[str, int]) -> Any:
    """A linear's tensors as megatron's checkpoints cut them, the factors among them.

    axes: the dimension of each tensor that tensor parallelism cuts.
    """
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    state = linear.state_dict(prefix="", keep_vars=True)
    # older versions know their groups
    takes_groups = "tp_group" in inspect.signature(make_sharded_tensors_for_checkpoint).parameters
    groups = {"tp_group": linear.tp_group, "dp_cp_group": metadata["dp_cp_group"]} if takes_groups else {}
    found = make_sharded_tensors_for_checkpoint(state, prefix, axes, offsets, **groups)
    if linear.halves:  # the weight's own halves are megatron's affair
        found[prefix + B] = apply_swiglu_sharded_factory(found[prefix + B], offsets)
    return found
