"""The machines of a run, and the command that each of them starts.

That is one torchrun a node, the same everywhere but for the node's rank. Nothing is started or looked up here; `launch`
does that.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_replay.config import Layout
from megatron_replay.errors import ConfigError, LayoutError

_SLURM_RANK, _SLURM_MASTER = "$SLURM_NODEID", "$MASTER_ADDR"


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Variables set for every rank, over those of the shell that launches."""

    values: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})

    def text(self) -> dict[str, str]:
        """The values as text: YAML's true is written true, not True."""
        return {
            name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in self.values.items()
        }


@dataclass(frozen=True, kw_only=True)
class Cluster:
    hosts: tuple[str, ...] = ()
    """The nodes, as each other and ssh can reach them; the first one is where the ranks meet."""
    hostfile: str = ""
    """A file with a host a line instead; what follows the name (`slots=8`) and `#` comments are left out."""
    nodes: int | None = None
    """How many nodes; of more hosts the first so many are used. When unset as many as hosts, or one."""
    master: str = ""
    """The address of node 0, when it is not the first host's name."""
    port: int = 29500
    """Free on node 0; ranks meet there."""
    devices: int = 8
    """Ranks a node."""
    device: Literal["cpu", "cuda", "npu"] = "npu"
    folder: str = ""
    """Where ssh goes on each node; this folder's path when unset, so that relative paths are right."""
    python: str = ""
    """The interpreter on each node; this one's path when unset."""
    environment: Variables = field(default_factory=Variables)
    slurm: tuple[str, ...] = ()
    """Further options of sbatch, as in `--partition=npu`."""

    def __post_init__(self) -> None:
        for name in ("nodes", "devices", "port"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.hosts and self.hostfile:
            raise ConfigError(f"hosts and hostfile={self.hostfile} are both set; keep one")

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts in use; none where neither `hosts` nor `hostfile` names them."""
        listed = self.hosts or (_read_hosts(Path(self.hostfile)) if self.hostfile else ())
        if self.nodes is not None and listed and len(listed) < self.nodes:
            raise ConfigError(f"nodes={self.nodes}, but only {len(listed)} hosts are named: {', '.join(listed)}")
        return listed[: self.nodes]

    @property
    def size(self) -> int:
        return self.nodes or len(self.names) or 1

    @property
    def meeting(self) -> str:
        """The address at which the ranks meet. Raises ConfigError when there are several nodes and none is given."""
        if self.master or self.names:
            return self.master or self.names[0]
        if self.size > 1:
            raise ConfigError(
                f"nodes={self.size} need the address of the first one: set master=ADDRESS, hosts or hostfile"
            )
        return "127.0.0.1"


def _read_hosts(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"hostfile={path}: cannot be read: {getattr(err, 'strerror', '') or err}") from err
    found = tuple(words[0] for line in lines if (words := line.partition("#")[0].split()))
    if not found:
        raise ConfigError(f"hostfile={path}: names no host; write one a line")
    return found


def check_layout(cluster: Cluster, layout: Layout) -> int:
    """The number of data-parallel replicas. Raises LayoutError unless the ranks are a multiple of tensor x pipeline."""
    ranks, model = cluster.size * cluster.devices, layout.tensor * layout.pipeline
    if ranks % model:
        raise LayoutError(
            f"{cluster.size} nodes x {cluster.devices} devices are {ranks} ranks, but layout.tensor={layout.tensor} x "
            f"layout.pipeline={layout.pipeline} needs a multiple of {model}; change nodes, devices or the layout"
        )
    return ranks // model


def node_command(
    cluster: Cluster, variables: Mapping[str, str], command: Sequence[str], *, rank: str, master: str = ""
) -> list[str]:
    """The command of one node: `env NAME=value ... python -m torch.distributed.run ... -m megatron_replay VERB ...`."""
    where = ["--nnodes", str(cluster.size), "--nproc-per-node", str(cluster.devices), "--node-rank", rank]
    where += ["--master-addr", master or cluster.meeting, "--master-port", str(cluster.port)]
    python = cluster.python or sys.executable
    assigned = [f"{name}={value}" for name, value in variables.items()]
    return ["env", *assigned, python, "-m", "torch.distributed.run", *where, "-m", "megatron_replay", *command]


def ssh_command(cluster: Cluster, host: str, node: Sequence[str]) -> list[str]:
    """The same command through ssh.

    It has a terminal (-tt), so that what runs there ends when the connection does.
    """
    there = f"cd {shlex.quote(cluster.folder or os.getcwd())} && exec {shlex.join(node)}"
    return ["ssh", "-tt", "-o", "BatchMode=yes", host, there]


def sbatch_file(cluster: Cluster, variables: Mapping[str, str], command: Sequence[str]) -> str:
    """A file for sbatch: one task a node, which starts torchrun. Slurm names the hosts and their ranks."""
    words = node_command(cluster, variables, command, rank=_SLURM_RANK, master=_SLURM_MASTER)
    node = " ".join(f'"{word}"' if word in (_SLURM_RANK, _SLURM_MASTER) else shlex.quote(word) for word in words)
    options = [
        f"--job-name=replay-{command[0]}",
        f"--nodes={cluster.size}",
        "--ntasks-per-node=1",
        "--exclusive",
        *cluster.slurm,
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {option}" for option in options),
            "set -euo pipefail",
            'HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
            "export MASTER_ADDR=${HOSTS%%$'\\n'*}",
            f"cd {shlex.quote(cluster.folder or os.getcwd())}",
            "srun --kill-on-bad-exit=1 bash -c " + shlex.quote(f"exec {node}"),
            "",
        ]
    )
