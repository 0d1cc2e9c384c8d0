"""The table of shims: one entry for each change we make to megatron-core's surroundings.

megatron-core names CUDA in literals, which must lead to the CPU on the CPU. On the NPU an adapter does that (see
`adapters`), and this table has what the adapter leaves out. `tests/ranks/test_shims.py` runs training without each of
the CPU's shims in turn, `tests/npu` without each of the NPU's. These tests fail when a shim is no longer needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_replay.device import Device
from megatron_replay.parallel.shims import patches
from megatron_replay.parallel.shims.adapters import NONE, DeviceAdapter
from megatron_replay.parallel.shims.versions import megatron_version, within


@dataclass(frozen=True)
class Shim:
    """One change to megatron-core's surroundings."""

    name: str
    where: str
    """The megatron-core code that needs it."""
    why: str
    versions: str
    """The versions of megatron-core on which it is applied."""
    apply: Callable[[], None]


def table(device: Device, version: str | None = None, adapter: DeviceAdapter = NONE) -> list[Shim]:
    """The shims that `install` applies on this device; `version` is megatron-core's, by default the imported one's."""
    here = version or megatron_version()
    return [shim for shim in catalog(device, adapter) if within(here, shim.versions)]


def catalog(device: Device, adapter: DeviceAdapter = NONE) -> list[Shim]:
    """The shims of this device for all versions of megatron-core.

    MindSpeed and MegatronAdaptor bring some of the NPU's themselves, so those are left out beside them.
    """
    if device.name == "cpu":
        return [*_CPU_SHIMS, *_COMMON_SHIMS]
    if device.name == "npu":
        return [*(_NPU_SHIMS if adapter == NONE else ()), *_NPU_ALWAYS, *_COMMON_SHIMS]
    return list(_COMMON_SHIMS)


_ALL = ">=0.12,<0.17"
_COMMON_SHIMS = [
    Shim(
        "group_step",
        "optimizer/distrib_optimizer.py",
        "without apex it reads the step count of torch's AdamW from each parameter; ours counts in the parameter "
        "group, as apex does",
        _ALL,
        patches.group_step,
    ),
    Shim(
        "results_queue",
        "dist_checkpointing/strategies/filesystem_async.py",
        "every rank starts a manager process for one result, which outlives the rank and holds its output open; we "
        "save synchronously, where a queue inside the process does",
        _ALL,
        patches.results_queue,
    ),
    Shim(
        "save_here",
        "dist_checkpointing/strategies/base.py",
        "a synchronous save forks a process that writes, whose result never comes to a queue inside this one",
        ">=0.12,<0.15",
        patches.save_here,
    ),
    Shim(
        "write_format",
        "dist_checkpointing/strategies/filesystem_async.py",
        "it writes by a private function of torch, which since torch 2.7 must be told the format",
        ">=0.12,<0.13",
        patches.write_format,
    ),
    Shim(
        "frozen_embedding",
        "distributed/finalize_model_grads.py",
        "the gradient of an embedding tied to the head of another stage is reduced, though beside an adapter it is "
        "frozen and has none",
        ">=0.12,<0.13",
        patches.frozen_embedding,
    ),
    Shim(
        "no_fp8",
        "optimizer/distrib_optimizer.py, fp8_utils.py",
        "without transformer-engine ZeRO-1 raises where it would quantize parameters to fp8, though there are none",
        ">=0.12,<0.13",
        patches.no_fp8,
    ),
]
_TENSOR_TYPE = Shim(
    "tensor_type",
    "optimizer/optimizer.py, distrib_optimizer.py",
    "parameters are sorted by comparing param.type() with 'torch.cuda.FloatTensor'",
    _ALL,
    patches.tensor_type,
)
_NPU_SHIMS = [_TENSOR_TYPE]
_NPU_ALWAYS = [
    Shim(
        "capability",
        "distributed/finalize_model_grads.py",
        "its broadcast: torch's asks tensors that say they are CUDA's for a capability, which transfer_to_npu leaves "
        "None",
        _ALL,
        patches.capability,
    ),
    Shim(
        "rotary",
        "models/common/embeddings/rope_utils.py",
        "five elementwise operators a rotation; the NPU has one (megatron knows transformer-engine's only)",
        _ALL,
        patches.rotary,
    ),
]
_CPU_SHIMS = [
    Shim(
        "current_device",
        "tensor_parallel/layers.py, p2p_communication.py, param_and_grad_buffer.py",
        "device=torch.cuda.current_device() raises without CUDA",
        _ALL,
        patches.current_device,
    ),
    Shim(
        "factories",
        "pipeline_parallel/schedules.py, optimizer/optimizer.py",
        "torch.zeros(..., device='cuda') and its like are literals",
        _ALL,
        patches.factories,
    ),
    Shim(
        "synchronize",
        "pipeline_parallel/p2p_communication.py",
        "torch.cuda.synchronize() after batched sends raises without CUDA",
        _ALL,
        patches.synchronize,
    ),
    Shim(
        "rng",
        "tensor_parallel/random.py",
        "model_parallel_cuda_manual_seed asks CUDA; _set_cuda_rng_state queues a CUDA call that never runs, so "
        "dropout would silently not be forked",
        _ALL,
        patches.rng,
    ),
    Shim(
        "tensor_cuda",
        "models/common/language_module/language_module.py",
        "weight.data.cuda() of tied embeddings on two pipeline stages",
        _ALL,
        patches.tensor_cuda,
    ),
    _TENSOR_TYPE,
]
