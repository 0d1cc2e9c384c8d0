"""torch's operators on npu:0 tensors of the memory-only runtime, computed by torch's own CPU kernels.

The kernels use the same memory. CANN's operators (aclnn) are not here, and our kernels stand between ordinary torch
operators. Inside `HostMath` the CPU runs those on a view of the same bytes, and torch-npu's fused operators by their
plain forms (documented.py).

Nothing else changes. Tensors are npu:0 tensors of the real torch-npu; views, autograd and dispatch are its own. Our
operators go to what is registered for the NPU. Where nothing is, they go to plain torch operators that are seen here
again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import documented
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from megatron_replay.doctor.operators import Seen, device_type

NPU = torch.device("npu", 0)
MAKES_TENSORS = (
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::set_.source_Storage_storage_offset",
    "aten::detach",
)
"""Operators that torch-npu does without CANN's operators, besides views."""
FOR_THE_BINDING = (
    "clone",
    "sort.stable", "sort", "unique_consecutive", "diff", "repeat_interleave.Tensor", "cat", "cumsum", "index_select",
    "arange", "ge.Tensor", "masked_fill.Scalar", "gather", "eq.Scalar", "zeros", "zero_", "_to_copy", "fill_.Scalar",
)  # fmt: skip
"""Operators that csrc/ascend/torch_binding.cpp calls from C++, where no mode sees them."""


class HostMath(Seen):
    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.name()
        if device_type(args, kwargs) != "npu":
            return func(*args, **kwargs)
        if func.namespace == "npu":
            named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            return on_host(documented.OPERATORS[name.removeprefix("npu::")], (), {**named, **kwargs})
        if func.namespace == "megatron_replay" or func.is_view or name in MAKES_TENSORS:
            return func(*args, **kwargs)
        return on_host(func, args, kwargs)


def on_host(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call it on CPU tensors of the same memory; new results are moved to npu:0, unless the call says where they go."""
    shadows: dict[int, tuple[Tensor, Tensor]] = {}

    def lower(x: Any) -> Any:
        if isinstance(x, Tensor) and x.device.type == "npu":
            shadow = host_view(x)
            shadows[id(shadow)] = shadow, x
            return shadow
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "npu" else x

    asked = kwargs.get("device")
    stays = asked is not None and torch.device(asked).type != "npu"

    def lift(x: Any) -> Any:
        if not isinstance(x, Tensor) or stays:
            return x
        if id(x) in shadows:
            return shadows[id(x)][1]
        out = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=NPU)
        host_view(out).copy_(x)
        return out

    return tree_map(lift, function(*tree_map(lower, args), **tree_map(lower, kwargs)))


def host_view(x: Tensor) -> Tensor:
    """The same bytes as a CPU tensor; only the memory-only runtime allows it."""
    if not x.numel():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    storage = x.untyped_storage()
    usable = storage.nbytes() // x.element_size() * x.element_size()
    buffer = (ctypes.c_char * usable).from_address(storage.data_ptr())
    return torch.frombuffer(buffer, dtype=x.dtype).as_strided(x.size(), x.stride(), x.storage_offset())


def serve_the_binding() -> torch.library.Library:
    """Register the host's operators for the NPU in torch's dispatcher, for calls from C++.

    They last as long as the object returned.
    """
    library = torch.library.Library("aten", "IMPL")
    for name in FOR_THE_BINDING:
        base, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, base), overload or "default")
        library.impl(
            name, lambda *args, _func=func, **kwargs: on_host(_func, args, kwargs), "PrivateUse1", allow_override=True
        )
    return library
