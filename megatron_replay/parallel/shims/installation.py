"""Import megatron-core, and put the shims of a device in place."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Collection
from typing import Any

import torch

from megatron_replay.device import Device
from megatron_replay.parallel.shims.adapters import adapter, import_adapter
from megatron_replay.parallel.shims.entries import table

_installed: list[str] = []


def import_megatron() -> None:
    """Import the parts of megatron-core we use, with `torch.compile` switched off meanwhile.

    megatron decorates about 35 helpers with torch.compile at import. That loads dynamo and inductor, which takes 4-5 s
    in every process and gains nothing on the CPU.
    """
    _quiet()
    real = torch.compile
    torch.compile = _no_compile  # type: ignore[assignment]
    try:
        for name in (
            "models.gpt",
            "optimizer",
            "distributed",
            "pipeline_parallel",
            "dist_checkpointing",
            "transformer.transformer_block",
        ):
            importlib.import_module(f"megatron.core.{name}")
    finally:
        torch.compile = real


def install(device: Device, *, skip: Collection[str] = ()) -> list[str]:
    """Apply the shims of `device`; returns their names. A second call changes nothing.

    skip: names of shims to leave out, for the tests that show that each is needed.
    """
    if _installed:
        return list(_installed)
    chosen, _ = adapter(device)
    if device.name == "npu":
        import_adapter(chosen)
    _quiet()
    if device.name in ("cpu", "npu"):
        import_megatron()
    for shim in table(device, adapter=chosen):
        if shim.name not in skip:
            shim.apply()
            _installed.append(shim.name)
    return list(_installed)


def _quiet() -> None:
    """Silence warnings that a user can do nothing about.

    They are megatron's uses of deprecated parts of torch, and the notes of every rank that apex and transformer-engine
    are missing, which `doctor` gives once.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    for module in (r"megatron\.", r"torch\.distributed\."):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def _no_compile(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else (lambda inner: inner)
