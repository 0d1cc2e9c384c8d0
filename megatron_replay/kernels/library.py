"""The operators under `torch.ops.megatron_replay`, registered once, and the choice of the kernel that answers for each.

Importing this module loads the extensions and registers the operators: the only import of the package with an effect.
Plain torch serves every device (CompositeExplicitAutograd). A compiled kernel registered for a device's dispatch key
takes precedence there; for CUDA that is `on_cuda`'s choice between Triton and plain torch. Collectives stay in Python
between the operators, so kernels never communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from megatron_replay.kernels import loading, on_cuda
from megatron_replay.kernels.schemas import OPERATORS

NAMESPACE = "megatron_replay"

DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}
"""Device type -> torch's dispatch key for its kernels."""


@dataclass(frozen=True)
class Kernels:
    """The operators with a twin in plain torch, to be called by name."""

    restricted_fwd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    restricted_bwd_dh: Callable[..., None]
    restricted_bwd_dw: Callable[..., None]
    restricted_bwd_rows: Callable[..., Tensor]
    restricted_logits_fwd: Callable[..., tuple[Tensor, Tensor]]
    restricted_logits_bwd: Callable[..., None]
    topk_rows: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose(mode: str = "auto") -> Kernels:
    """The operators to call in a mode. Raises ConfigError for an unknown one.

    `auto` goes through the dispatcher, which prefers a compiled kernel; `reference` is plain torch.
    """
    loading.check_mode(mode)
    names = [field.name for field in fields(Kernels)]
    if mode == "auto":
        return Kernels(**{name: getattr(torch.ops.megatron_replay, name) for name in names})
    return Kernels(**{name: OPERATORS[name].twin for name in names})  # type: ignore[arg-type]


def answering(operator: str, device_type: str, mode: str) -> str:
    """The kernel that answers on tensors of a device type: "compiled", "triton" or "reference".

    Imports Triton for cuda. Raises ConfigError for an unknown mode.
    """
    loading.check_mode(mode)
    if mode == "reference" or not _has_kernel(operator, DISPATCH_KEYS.get(device_type)):
        return "reference"
    if device_type == "cuda":
        return "triton" if on_cuda.triton() == "loaded" else "reference"
    return "compiled"


def live(device_type: str = "cpu", mode: str = "auto") -> dict[str, str]:
    """`answering` for every operator."""
    return {name: answering(name, device_type, mode) for name in OPERATORS}


def _has_kernel(operator: str, key: str | None) -> bool:
    return key is not None and bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator}", key))


def _register() -> torch.library.Library:
    """Define the operators, except those that an older extension or another copy of this module has defined.

    The CPU's extension must be loaded before. A kernel whose types differ from the schema raises RuntimeError then;
    loaded after the definition, it would end the process.
    """
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, operator in OPERATORS.items():
        if not hasattr(torch.ops.megatron_replay, name):
            library.define(name + operator.schema)
        if operator.twin and not _has_kernel(name, "CompositeExplicitAutograd"):
            library.impl(name, operator.twin, "CompositeExplicitAutograd")
        if operator.triton and not _has_kernel(name, "CUDA"):
            library.impl(name, partial(on_cuda.call, name), "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{name}", operator.fake, lib=library, allow_override=True)
    return library


def _usable(state: str) -> str:
    """The state of the CPU's extension, corrected where it lacks an operator's kernel."""
    lacks = next((name for name in OPERATORS if not _has_kernel(name, "CPU")), None)
    if state == "loaded" and lacks:
        return f"cannot be used: built before {lacks} was there; build it again"
    return state


_LOADED = loading.load()

LIBRARY = globals().get("LIBRARY") or _register()
"""Kept alive: the registrations last as long as this object."""

EXTENSION = _usable(_LOADED)
"""The state of the CPU's compiled kernels: "loaded", "not built", or why they cannot be used."""

NPU_EXTENSION = loading.load(loading.NPU) if hasattr(torch, "npu") else "torch-npu is not loaded"
"""The state of the NPU's compiled kernels.

`device.choose` loads torch-npu, and then these kernels, where torch did not load it by itself.
"""
