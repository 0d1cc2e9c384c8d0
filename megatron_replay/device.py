"""The device seam: cpu/gloo (default), cuda/nccl, npu/hccl.

Only this file and `parallel/shims/` name a device's module. A `Device` answers the questions of the rest: where tensors
live, which backend moves them between ranks, and what the hardware has.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from megatron_replay.environment import VARIABLES
from megatron_replay.errors import ConfigError, DeviceError
from megatron_replay.kernels import loading

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ASCEND_HOME_PATH", "TORCH_DEVICE_BACKEND_AUTOLOAD")
"""Variables that launchers and installations set. Those that a user sets stand in `environment`."""


@dataclass(frozen=True)
class Device:
    name: str
    """cpu, cuda or npu, which is also the torch device type."""
    backend: str
    """Name of the torch.distributed backend."""
    has_bf16: bool
    """True where matrix products in bf16 are faster than in fp32."""
    has_fp64: bool
    """True where the device computes in fp64."""

    @property
    def module(self) -> Any:
        """torch.cuda, torch.npu, or None on the cpu."""
        return getattr(torch, self.name) if self.name != "cpu" else None

    def at(self, index: int = 0) -> torch.device:
        return torch.device("cpu") if self.name == "cpu" else torch.device(self.name, index)

    def select(self, index: int) -> torch.device:
        """Make device `index` this process's current one."""
        if self.module is not None:
            if index >= self.count():
                raise DeviceError(
                    f"local rank {index} has no {self.name} device: {self.count()} here; start fewer ranks per node"
                )
            self.module.set_device(index)
        return self.at(index)

    def count(self) -> int:
        return int(self.module.device_count()) if self.module is not None else 1

    def synchronize(self) -> None:
        if self.module is not None:
            self.module.synchronize()

    def instant(self) -> Any:
        """Now, for `seconds`. On a device it is an event at the end of its queue, and nothing waits for it."""
        if self.module is None:
            return time.perf_counter()
        event = self.module.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Seconds between two instants. Waits until the device has come to the last."""
        if self.module is None:
            return float(last - first)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000

    def profiler(self) -> Any:
        """A profiler of this process and its device, not started: `start`, `stop`, `export_chrome_trace(path)`."""
        if self.name == "npu":
            return importlib.import_module("torch_npu.profiler").profile()  # by default it records host and device
        kinds = torch.profiler.ProfilerActivity
        return torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if self.name == "cuda" else [kinds.CPU])

    def peak_memory(self) -> int:
        """Largest number of bytes this process ever held: device memory, or resident memory on the cpu."""
        if self.module is not None:
            return int(self.module.max_memory_allocated())
        status = Path("/proc/self/status")
        if status.exists():  # after an exec getrusage would start at the parent's size
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def held_memory(self) -> int:
        """Bytes this process holds now: device memory, or resident memory on the cpu."""
        if self.module is not None:
            return int(self.module.memory_allocated())
        return int(psutil.Process().memory_info().rss)

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the current device, or of the machine on the cpu."""
        if self.module is not None:
            free, total = self.module.mem_get_info()
            return int(free), int(total)
        machine = psutil.virtual_memory()
        return int(machine.available), int(machine.total)

    def model_name(self) -> str:
        """The maker's name of the first device."""
        return str(self.module.get_device_name(0)) if self.module is not None else platform.machine()


CPU = Device("cpu", "gloo", has_bf16=False, has_fp64=True)
CUDA = Device("cuda", "nccl", has_bf16=True, has_fp64=True)
NPU = Device("npu", "hccl", has_bf16=True, has_fp64=False)


def available() -> list[Device]:
    """The devices that this process could use, best first; the CPU is always last."""
    found = [NPU] if _npu_present() else []
    if torch.cuda.is_available():
        found.append(CUDA)
    return [*found, CPU]


def choose(name: str = "auto") -> Device:
    """The device called `name`, or with "auto" the best one here. Raises DeviceError when it is not here."""
    here = {device.name: device for device in available()}
    if name == "auto":
        return next(iter(here.values()))
    if name not in here:
        hint = " (torch-npu is not installed or finds no device)" if name == "npu" else ""
        raise DeviceError(f"device={name} is not available here{hint}; this machine has: {', '.join(here)}")
    return here[name]


def _npu_present() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError):  # the wheel is here but CANN's libraries are not
        return False
    loading.load(loading.NPU)
    return bool(NPU.module.is_available())


def dtype(precision: str, device: Device) -> torch.dtype:
    """The dtype of the model's weights. Raises DeviceError where the device lacks it."""
    if precision == "auto":
        precision = "bf16" if device.has_bf16 else "fp32"
    if precision == "fp64" and device.name != "cpu":
        raise DeviceError(
            f"precision=fp64 is for checking layouts against each other on the cpu, not for {device.name}; use fp32 "
            "or bf16"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]


def launcher_ranks() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) that torchrun set for this process, or None when it runs alone."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank = int(os.environ["RANK"])
    return rank, int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", rank))


def node_rank() -> int | None:
    """NODE_RANK, which a launcher sets on each of several nodes, or None. Raises ConfigError when it is no number."""
    text = os.environ.get("NODE_RANK")
    if text is not None and not text.isdecimal():
        raise ConfigError(f"NODE_RANK={text!r} is no number; set it to 0 on the first node, 1 on the next, and so on")
    return None if text is None else int(text)


def environment() -> dict[str, str]:
    """The variables that are set and change how ranks run, find each other or use their device."""
    names = (*_LAUNCHER, *(variable.name for variable in VARIABLES))
    return {name: os.environ[name] for name in names if name in os.environ}


def fused_operator(name: str, device_type: str) -> Callable[..., Any] | None:
    """torch-npu's fused operator of this name for tensors on an NPU; None elsewhere, or where torch-npu lacks it."""
    return getattr(torch.ops.npu, name, None) if device_type == "npu" else None


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
