"""The optimizer in a checkpoint: the choice of megatron's form, and that form where megatron does not have it.

Under ZeRO-1 the form is the one megatron-core calls fully_reshardable (since 0.15). It holds every parameter's fp32
copy and two moments, each in the parameter's own shape, and is read on any layout. Older versions have only forms of
their own, which 0.16 cannot read. For them the same tensors are written here under the same keys. So a run can stop on
one version and go on with the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FORM = "fully_reshardable"
"""The form under ZeRO-1. megatron's default is another, which 0.16.1 writes but cannot load again."""
KEYS = ("param", "exp_avg", "exp_avg_sq")
"""DistributedOptimizer's names of the tensors it keeps of a parameter."""
IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""The settings that distinguish megatron's parameter groups."""


def sharded_state(outer: Any, model_state: Any, metadata: dict[str, Any], *, loading: bool) -> Any:
    """The state of megatron's optimizer `outer` that dist_checkpointing saves or fills; `metadata` names FORM."""
    part = only(outer)
    if not hasattr(part, "model_param_group_index_map"):
        return outer.sharded_state_dict(model_state, is_loading=loading)
    if hasattr(part, "sharded_param_state_fully_reshardable"):
        return outer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)
    return {
        **part.state_dict(),
        "param_state": reshardable(part, model_state, loading=loading),
        "param_state_sharding_type": FORM,
    }


def load_state(outer: Any, state: Any) -> None:
    """Fill megatron's optimizer from the state that `sharded_state` asked for."""
    part = only(outer)
    holder = state.get("optimizer", state)
    holder["param_groups"] = in_order(holder["param_groups"], part.optimizer.param_groups)
    if not hasattr(part, "model_param_group_index_map") or hasattr(part, "load_parameter_state_from_fully_reshardable"):
        outer.load_state_dict(state)
        return
    part.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
    load_reshardable(part, state["param_state"])


def in_order(saved: list[dict[str, Any]], ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The saved parameter groups in the order of this rank's.

    megatron-core 0.12 makes the groups in the order in which a stage meets its parameters, and loads them by number.
    Then the first stage's first group, which is a matrix's, would go to a later stage's norms, which have no weight
    decay.
    """
    known = {_identity(group): group for group in saved}
    ordered = []
    for place, group in zip(saved, ours, strict=True):
        found = dict(known.get(_identity(group), place))
        ordered.append({**found, "params": place["params"]} if "params" in place else found)
    return ordered


def reshardable(part: Any, model_state: Any, *, loading: bool) -> dict[int, dict[str, Any]]:
    """The state of megatron's DistributedOptimizer `part` as FORM has it: parameter's number -> key -> sharded tensor.

    Memory: three fp32 copies of this rank's model on the host, as megatron's own FORM takes.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    places = {place.data: place for place in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
    found: dict[int, dict[str, Any]] = {}
    for number, (param, tensors) in enumerate(_empty(part) if loading else _gathered(part)):
        place, found[number] = places[param], {}
        for key, tensor in tensors.items():
            # a factory makes several tensors of one
            typed = {"dtype": tensor.dtype} if isinstance(place, ShardedTensor) else {}
            found[number][key] = replace(
                place, key=f"optimizer.state.{key}.{place.key}", data=tensor.view(param.shape), **typed
            )
    return found


def load_reshardable(part: Any, loaded: dict[int, dict[str, Tensor]]) -> None:
    """Cut this rank's shards out of the whole tensors."""
    for number, param in enumerate(_params(part)):
        if param in part.model_param_gbuf_map:
            span = part._get_model_param_range_map(param)["param"]
            shards = {key: loaded[number][key].flatten()[span.start : span.end] for key in KEYS}
            part._set_main_param_and_optimizer_states(param, shards)


def only(outer: Any) -> Any:
    """A dense model's one optimizer inside megatron's chain."""
    parts = getattr(outer, "chained_optimizers", [outer])
    assert len(parts) == 1, "a dense model has one optimizer"
    return parts[0]


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[key] for key in IDENTITY)


def _params(part: Any) -> list[Any]:
    """Every parameter of this rank's model, in an order that saving and loading share."""
    return [param for buffer in part.buffers for param in buffer.param_index_map]


def _empty(part: Any) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    for param in _params(part):
        yield param, {key: torch.empty(param.numel()) for key in KEYS}


def _gathered(part: Any) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """(parameter, key -> its whole tensor, flat, on the host), from the shards of the data-parallel group."""
    ranks = dist.get_world_size(part.data_parallel_group)
    for buffer, by_type in zip(part.buffers, part.gbuf_ranges, strict=True):
        (held,) = by_type.values()
        whole = {key: torch.zeros(buffer.numel) for key in KEYS}
        for bucket, ours in zip(buffer.buckets, held, strict=True):
            for key in KEYS:
                shard = torch.zeros(bucket.grad_data.numel() // ranks, device=bucket.grad_data.device)
                for param, span in ours["param_map"].items():
                    tensors = part._get_main_param_and_optimizer_states(param)
                    shard[span["gbuf_local"].start : span["gbuf_local"].end] = tensors[key].detach()
                all_shards = torch.empty(len(shard) * ranks, device=shard.device)
                dist.all_gather_into_tensor(all_shards, shard, group=part.data_parallel_group)
                whole[key][bucket.offset : bucket.offset + len(all_shards)] = all_shards.cpu()
        for param, (start, stop, _) in buffer.param_index_map.items():
            yield param, {key: whole[key][start:stop] for key in KEYS}
