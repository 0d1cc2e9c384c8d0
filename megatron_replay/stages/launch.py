"""Start a verb on every device of one node or several.

The environment is checked, completed and printed; then torchrun takes over. Each node starts its own part (NODE_RANK
says which). Or one node starts all by ssh, or Slurm starts them with the file that is written for it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_replay.cluster import Cluster, check_layout, node_command, sbatch_file, ssh_command
from megatron_replay.config import RunConfig
from megatron_replay.config_file import load
from megatron_replay.device import CPU, CUDA, NPU, dtype, environment, node_rank
from megatron_replay.environment import Finding, check, completed
from megatron_replay.errors import ConfigError
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.parallel.memory import predict
from megatron_replay.runtime.memory_table import lines


def run(
    config: RunConfig,
    command: Sequence[str],
    path: str | None,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    rank: str | None = None,
    ssh: bool = False,
    slurm: str | None = None,
) -> int:
    """Start `command` on the cluster that a file and overrides describe.

    `command` is a verb and its arguments, from which `config` was read. The function does not return when this node
    runs its part, because torchrun takes the process over. With `ssh` it returns the first exit code that is not 0,
    after which the other nodes are ended.
    """
    cluster = load(Cluster, path, overrides)
    replicas = check_layout(cluster, config.layout)
    if config.device not in ("auto", cluster.device):
        raise ConfigError(f"the run says device={config.device}, the cluster device={cluster.device}; make them agree")
    command = [*command, f"device={cluster.device}"]
    findings = check(cluster.device, {**environment(), **cluster.environment.text()}, nodes=cluster.size)
    variables = {**completed(findings), **cluster.environment.text()}
    about = [
        *_about(cluster, config, replicas),
        *([predicted_memory(config, cluster)] if dry_run else []),
        *map(_line, findings),
    ]
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if wrong and not dry_run:
        raise ConfigError(f"{wrong[0]}; correct it, or set it in the cluster file's `environment`")
    print("\n".join(about), flush=True)
    if slurm:
        return _slurm(Path(slurm), sbatch_file(cluster, variables, command), write=not dry_run)
    nodes = [node_command(cluster, variables, command, rank=str(i)) for i in range(cluster.size)]
    if dry_run:
        return _show(cluster, nodes, ssh=ssh)
    if ssh:
        if not cluster.names:
            raise ConfigError("--ssh needs the nodes' names: set hosts or hostfile")
        return _all([ssh_command(cluster, host, node) for host, node in zip(cluster.names, nodes, strict=True)])
    mine = nodes[_rank(cluster, rank)]
    print(shlex.join(mine), flush=True)
    os.execvp(mine[0], mine)


def predicted_memory(config: RunConfig, cluster: Cluster) -> str:
    """The predicted peak memory of a device of each pipeline stage in training, for `--dry-run`.

    The memory of the process itself is not in it.
    """
    if not config.model or not Path(config.model).is_dir():
        return f"predicted memory per device: not without the model (model={config.model!r} is not here)"
    source, device = Source.open(config.model), {d.name: d for d in (CPU, CUDA, NPU)}[cluster.device]
    config = replace(config, layout=source.layout(config.layout))
    ranks = cluster.size * cluster.devices
    return "\n".join(
        lines(predict(source.spec, config, ranks=ranks, dtype=dtype(config.precision, device), device=device))
    )


def _about(cluster: Cluster, config: RunConfig, replicas: int) -> list[str]:
    layout = config.layout
    where = f", on {', '.join(cluster.names)}" if cluster.names else ""
    return [
        f"nodes {cluster.size} x {cluster.device} devices {cluster.devices}{where}",
        f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {replicas}",
        f"micro-batch {config.batch.micro}, global batch {config.batch.total}, sequence length "
        f"{config.data.seq_length}",
    ]


def _line(finding: Finding) -> str:
    set_now = finding.state == "missing" and finding.wanted
    return f"environment: {finding}" + (", set by launch" if set_now else "")


def _rank(cluster: Cluster, given: str | None) -> int:
    if given is not None and not given.isdecimal():
        raise ConfigError(f"--node-rank is a number from 0 to {cluster.size - 1}, got {given!r}")
    found = int(given) if given is not None else node_rank()
    if found is None:
        if cluster.size > 1:
            raise ConfigError(
                f"NODE_RANK is not set: which of {cluster.size} nodes is this? set it, or --node-rank, or use --ssh "
                "or --slurm"
            )
        return 0
    if found >= cluster.size:
        raise ConfigError(
            f"this is node {found}, but there are {cluster.size}, counted from 0; change NODE_RANK or nodes"
        )
    return found


def _slurm(path: Path, text: str, *, write: bool) -> int:
    if not write:
        print(text, end="")
        return 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"--slurm={path}: cannot be written: {err.strerror}") from err
    print(f"written: {path}; start it with: sbatch {shlex.quote(str(path))}")
    return 0


def _show(cluster: Cluster, nodes: list[list[str]], *, ssh: bool) -> int:
    for i, node in enumerate(nodes):
        host = cluster.names[i] if cluster.names else f"node {i}"
        print(f"{host} (NODE_RANK={i}):\n  {shlex.join(ssh_command(cluster, host, node) if ssh else node)}")
    return 0


def _all(commands: list[list[str]]) -> int:
    """Run all at once and wait. The first that fails ends the others, and so does a signal."""
    started = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for command in commands]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while True:
            codes = [process.poll() for process in started]
            failed = [code for code in codes if code]
            if failed or all(code == 0 for code in codes):
                return failed[0] if failed else 0
            time.sleep(0.2)
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
