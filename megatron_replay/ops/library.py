"""Operator schemas: the one place where a compiled kernel and its plain-torch twin meet.

Importing this module registers the schemas under `torch.ops.megatron_replay`, once: the only import of the package with
an effect. Plain torch serves every device (CompositeExplicitAutograd); a compiled kernel registered for a device key
(CPU, PrivateUse1) under the same schema takes precedence there, and for CUDA what `on_cuda` chooses: Triton's, or plain
torch where there is no Triton. Collectives stay in Python between the operators, so kernels never communicate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_replay import compiled
from megatron_replay.ops import on_cuda
from megatron_replay.ops import torch_kernels as plain
from megatron_replay.ops.shard import accumulator

NAMESPACE = "megatron_replay"

SCHEMAS = {
    "restricted_fwd": "(Tensor hidden, Tensor weight, Tensor offsets, Tensor columns, Tensor gold, bool mix) -> "
    "(Tensor, Tensor, Tensor)",
    "restricted_bwd_dh": "(Tensor(a!) mixture, Tensor weight, Tensor columns, Tensor gold, Tensor scale) -> ()",
    "restricted_bwd_dw": "(Tensor hidden, Tensor touched, Tensor begins, Tensor tokens, Tensor coefficient, "
    "Tensor(a!) grad_weight) -> ()",
    "restricted_bwd_rows": "(Tensor hidden, Tensor touched, Tensor begins, Tensor tokens, Tensor coefficient) -> "
    "Tensor",
    "restricted_logits_fwd": "(Tensor logits, Tensor offsets, Tensor columns, Tensor gold) -> (Tensor, Tensor)",
    "restricted_logits_bwd": "(Tensor z, Tensor offsets, Tensor columns, Tensor gold, Tensor scalars, Tensor(a!) "
    "grad_logits) -> ()",
    "topk_rows": "(Tensor logits, int k) -> (Tensor, Tensor, Tensor)",
}

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "npu": "PrivateUse1"}


@dataclass(frozen=True)
class Kernels:
    """The operators to call: compiled where a kernel is registered for the tensors' device, or always plain torch."""

    restricted_fwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    restricted_bwd_dh: Callable[..., None]
    restricted_bwd_dw: Callable[..., None]
    restricted_bwd_rows: Callable[..., Tensor]
    restricted_logits_fwd: Callable[..., tuple[Tensor, Tensor]]
    restricted_logits_bwd: Callable[..., None]
    topk_rows: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernels(mode: str = "auto") -> Kernels:
    """`auto`: through the dispatcher, which prefers a compiled kernel; `reference`: plain torch. Raises ConfigError for
    another mode."""
    compiled.check_mode(mode)
    source = torch.ops.megatron_replay if mode == "auto" else plain
    return Kernels(**{name: getattr(source, name) for name in SCHEMAS})


def live(device_type: str = "cpu", mode: str = "auto") -> dict[str, str]:
    """Which kernel answers on tensors of a device type, for each operator: "compiled", "triton" or "reference". Imports
    Triton for cuda."""
    kernels(mode)
    key = _DISPATCH_KEYS.get(device_type)

    def answer(name: str) -> str:
        registered = key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
        if not registered or mode == "reference":
            return "reference"
        if device_type == "cuda":
            return "triton" if on_cuda.triton() == "loaded" else "reference"
        return "compiled"

    return {name: answer(name) for name in SCHEMAS}


def _fake_fwd(
    hidden: Tensor, weight: Tensor, offsets: Tensor, columns: Tensor, gold: Tensor, mix: bool
) -> tuple[Tensor, Tensor, Tensor]:
    z = hidden.new_empty(columns.shape[0], dtype=accumulator(hidden.dtype))
    return z, z.new_empty(3, gold.shape[0]), z.new_empty(gold.shape[0] if mix else 0, hidden.shape[1])


def _fake_dh(mixture: Tensor, weight: Tensor, columns: Tensor, gold: Tensor, scale: Tensor) -> None:
    return None


def _fake_dw(
    hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor, grad_weight: Tensor
) -> None:
    return None


def _fake_rows(hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor) -> Tensor:
    return coefficient.new_empty(touched.shape[0], hidden.shape[1])


def _fake_logits_fwd(logits: Tensor, offsets: Tensor, columns: Tensor, gold: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.new_empty(columns.shape[0], dtype=accumulator(logits.dtype))
    return z, z.new_empty(3, gold.shape[0])


def _fake_logits_bwd(
    z: Tensor, offsets: Tensor, columns: Tensor, gold: Tensor, scalars: Tensor, grad_logits: Tensor
) -> None:
    return None


def _fake_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, kept = logits.shape[0], min(k, logits.shape[1])
    values = logits.new_empty(n, kept, dtype=accumulator(logits.dtype))
    return values, logits.new_empty(n, kept, dtype=torch.int64), logits.new_empty(n, dtype=torch.float64)


def _register() -> Any:
    """Define what is not defined yet: a compiled extension or a reload of this module may have been here before."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    fakes: dict[str, Callable[..., Any]] = {
        "restricted_fwd": _fake_fwd,
        "restricted_bwd_dh": _fake_dh,
        "restricted_bwd_dw": _fake_dw,
        "restricted_bwd_rows": _fake_rows,
        "restricted_logits_fwd": _fake_logits_fwd,
        "restricted_logits_bwd": _fake_logits_bwd,
        "topk_rows": _fake_topk,
    }
    for name, schema in SCHEMAS.items():
        qualified = f"{NAMESPACE}::{name}"
        if not hasattr(torch.ops.megatron_replay, name):
            library.define(name + schema)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeExplicitAutograd"):
            library.impl(name, getattr(plain, name), "CompositeExplicitAutograd")
            torch.library.register_fake(qualified, fakes[name], lib=library)
        if name in on_cuda.OPERATORS and not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CUDA"):
            library.impl(name, partial(on_cuda.call, name), "CUDA")
    return library


LIBRARY = globals().get("LIBRARY") or _register()
"""Kept alive: the registrations last as long as this object."""

EXTENSION = compiled.load()
"""What became of the compiled kernels: "loaded", "not built", or "cannot be loaded: ..."."""

NPU_EXTENSION = compiled.load(compiled.NPU) if hasattr(torch, "npu") else "torch-npu is not loaded"
"""The same of the NPU's; `device.choose` loads torch-npu and them where torch did not by itself."""
