"""The variables that decide how ranks find each other and use their device: wanted values, and a check of those set.

Values are those that Megatron and MindSpeed launch scripts use. The allowed values follow the makers' documentation:
CANN's "Environment variables" and "HCCL" references, and that of Ascend Extension for PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    name: str
    wanted: str
    """The value it should have; empty where only the site knows."""
    allowed: str | range
    """The values it may have: a regular expression, or whole numbers."""
    why: str
    devices: tuple[str, ...] = ("npu",)
    when: str = "always"
    """always | several nodes | on demand: when a run without it gets a notice."""


_NUMBERS = r"\d+(-\d+)?(,\d+(-\d+)?)*"
_INTERFACES = r"[=^]?[\w.:-]+(,[\w.:-]+)*"
_OPTIONS = r"\w+:[^,:]+(,\w+:[^,:]+)*"

VARIABLES = (
    Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        range(1, 33),
        "kernels start in the order megatron issues them",
        ("npu", "cuda"),
    ),
    Variable("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", _OPTIONS, "less fragmentation of device memory"),
    Variable(
        "HCCL_CONNECT_TIMEOUT",
        "3600",
        range(120, 7201),
        "seconds (120..7200) that ranks wait for each other to connect",
    ),
    Variable(
        "HCCL_EXEC_TIMEOUT",
        "3600",
        range(2**31),
        "seconds a rank waits in a collective (0: for ever), as while another saves",
    ),
    Variable("CPU_AFFINITY_CONF", "1", r"[0-2](,.+)?", "each rank stays on the cores near its device"),
    Variable("TASK_QUEUE_ENABLE", "2", range(3), "operators are issued from a queue of their own"),
    Variable(
        "HCCL_SOCKET_IFNAME", "", _INTERFACES, "the interface of HCCL, where hosts have several", when="several nodes"
    ),
    Variable(
        "GLOO_SOCKET_IFNAME",
        "",
        _INTERFACES,
        "the interface of gloo, where hosts have several",
        ("npu", "cuda", "cpu"),
        "several nodes",
    ),
    Variable(
        "NCCL_SOCKET_IFNAME",
        "",
        _INTERFACES,
        "the interface of NCCL, where hosts have several",
        ("cuda",),
        "several nodes",
    ),
    Variable(
        "HCCL_IF_BASE_PORT",
        "",
        range(1024, 65521),
        "first of the 32 host ports (1024..65520) HCCL takes; 60000 when unset",
        when="on demand",
    ),
    Variable(
        "HCCL_DETERMINISTIC", "true", r"true|false|strict", "the same sums in every run, at a cost", when="on demand"
    ),
    Variable("ASCEND_RT_VISIBLE_DEVICES", "", _NUMBERS, "which devices of the node a run may use", when="on demand"),
    Variable(
        "CUDA_VISIBLE_DEVICES",
        "",
        r"[\w-]+(,[\w-]+)*|",
        "which devices of the node a run may use",
        ("cuda",),
        "on demand",
    ),
    Variable(
        "OMP_NUM_THREADS",
        "1",
        range(1, 1025),
        "threads of each rank: all ranks of a node share its cores",
        ("npu", "cuda", "cpu"),
    ),
)


@dataclass(frozen=True)
class Finding:
    """One variable that matters here."""

    name: str
    state: str
    """set | missing | wrong."""
    value: str
    """The value it has; empty when missing."""
    wanted: str
    """The value it should have; empty where only the site knows."""
    why: str

    def __str__(self) -> str:
        wanted = self.wanted or "the site's own value"
        if self.state == "missing":
            return f"{self.name} is missing: {wanted} ({self.why})"
        if self.state == "wrong":
            return f"{self.name}={self.value} is wrong: {wanted} ({self.why})"
        return f"{self.name}={self.value}" + (
            f" (usual: {wanted}; {self.why})" if self.wanted not in ("", self.value) else ""
        )


def check(device: str, environ: Mapping[str, str], *, nodes: int = 1) -> list[Finding]:
    """The state of each of VARIABLES in `environ`, in order, for ranks of `nodes` nodes on `device`.

    `device` is cpu, cuda or npu.
    """
    return [
        Finding(v.name, _state(v, environ), environ.get(v.name, ""), v.wanted, v.why)
        for v in VARIABLES
        if device in v.devices
        and (v.name in environ or v.when == "always" or (v.when == "several nodes" and nodes > 1))
    ]


def _state(variable: Variable, environ: Mapping[str, str]) -> str:
    if variable.name not in environ:
        return "missing"
    value, allowed = environ[variable.name], variable.allowed
    right = value.isdecimal() and int(value) in allowed if isinstance(allowed, range) else re.fullmatch(allowed, value)
    return "set" if right else "wrong"


def completed(findings: Sequence[Finding]) -> dict[str, str]:
    """The variables as set, and the missing ones at their wanted values. Those that only the site knows stay unset."""
    return {f.name: f.value or f.wanted for f in findings if f.value or f.wanted}
