"""The state of this machine as torch and megatron find it, for `doctor`.

It covers devices, kernels, two ranks that add up a tensor, and the model in its layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from megatron_replay.config import RunConfig
from megatron_replay.device import Device, available, choose, cores, environment, fused_operator
from megatron_replay.doctor.operators import Seen, steps
from megatron_replay.environment import check
from megatron_replay.errors import DeviceError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.formats.torch_dist import Reader
from megatron_replay.kernels import library, loading, on_cuda
from megatron_replay.models.layout import validate_layout
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.parallel import shims
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.parallel.mcore import attention, layers
from megatron_replay.parallel.ranks.probe import try_all_reduce

Versions = Mapping[str, str | None]


def devices() -> dict[str, Any]:
    """Name -> model, count and memory of the first, best device first."""
    return {device.name: _device(device) for device in available()}


def _device(device: Device) -> dict[str, Any]:
    free, total = device.memory()
    return {
        "model": device.model_name(),
        "count": device.count(),
        "backend": device.backend,
        "bf16": device.has_bf16,
        "free_bytes": free,
        "total_bytes": total,
    }


def kernels(mode: str) -> dict[str, Any]:
    """The kernel that answers for each operator on each device here, and the state of the extensions and of Triton."""
    each = {device.name: library.live(device.name, mode) for device in available()}
    triton = on_cuda.triton() if "cuda" in each else "not needed: no cuda device here"
    npu = {"npu_extension": loading.load(loading.NPU)} if "npu" in each else {}
    return {"extension": library.EXTENSION, "triton": triton, **npu, **each}


def processor() -> dict[str, Any]:
    """Cores, threads that a process would start with, and the variables that are set."""
    return {"cores": cores(), "threads": torch.get_num_threads(), "variables": environment()}


def variables(config: RunConfig) -> list[dict[str, str]]:
    """The variables that ranks on this configuration's device should have, and their values: `environment.Finding`s."""
    return [dataclasses.asdict(finding) for finding in check(asked(config).name, environment())]


def megatron(config: RunConfig, versions: Versions) -> dict[str, Any]:
    """The adapter and shims between megatron-core and this configuration's device, and our parts in its model."""
    device = asked(config)
    adapter, not_used = shims.adapter(device)
    applied = shims.table(device, versions["megatron-core"] or "none", adapter)
    norm = " on npu_rms_norm" if fused_operator("npu_rms_norm", device.name) else ""
    core = (
        "npu_fusion_attention"
        if fused_operator("npu_fusion_attention", device.name)
        else "torch's scaled_dot_product_attention"
    )
    adam = next((name for name in ("transformer-engine", "apex") if versions[name]), "torch")
    return {
        "adapter": adapter.name,
        "adapters_not_used": not_used,
        "shims": [{"name": s.name, "where": s.where, "why": s.why, "versions": s.versions} for s in applied],
        "norm": f"our {layers.RMSNorm.__name__}{norm} for megatron's, which wants apex or transformer-engine or a "
        "single tensor rank",
        "attention": f"our {attention.segment_attention.__name__} on {core} for its DotProductAttention",
        "optimizer": f"our {config.optimizer.name} inside megatron's wrappers for the Adam of {adam}",
    }


def asked(config: RunConfig) -> Device:
    """The device of the configuration, or the best one here where that is absent."""
    try:
        return choose(config.device)
    except DeviceError:
        return choose()


def all_reduce(config: RunConfig) -> dict[str, Any]:
    """`probe.try_all_reduce` on the device of the configuration."""
    return try_all_reduce(asked(config))


def operators(config: RunConfig) -> dict[str, dict[str, int]]:
    """Device -> operator -> calls, of Stage 0 and training on a tiny model on the device of the configuration."""
    seen = Seen()
    with seen:
        steps(config, asked(config))
    return seen.by_device()


def model(config: RunConfig) -> dict[str, Any]:
    """The model of the configuration in the configured layout, by its headers alone.

    Raises ReplayError where it does not fit.
    """
    source = Source.open(config.model)
    spec, layout = source.spec, source.layout(config.layout)
    split, table = validate_layout(spec, layout), WeightTable.of(spec, layout)
    if source.is_checkpoint:
        Reader(source.path).check(table)
    else:
        HFFolder(source.path).check()
    return {
        "path": config.model,
        "architecture": spec.architecture,
        "parameters": table.numel,
        "tensor": layout.tensor,
        "layers_of_stages": split,
    }
