"""The identity of this process: its rank, its coordinates in the tensor x pipeline x data layout, and its groups.

`start` makes a `World` once per process, and it is passed on. Nothing else asks megatron's global state for ranks.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_replay.config import Layout
from megatron_replay.device import Device, launcher_ranks
from megatron_replay.errors import LayoutError
from megatron_replay.parallel import shims

PORTS = range(20_000, 32_768)
"""Ports for the ranks of this machine to meet at."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: Device
    torch_device: torch.device
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    tensor_group: Any
    pipeline_group: Any
    data_group: Any
    stage_rank: int = 0
    """The rank within this pipeline stage: tensor x data."""
    stage_group: Any = None

    @property
    def first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """True on the rank that holds the result of its model replica: last stage, first tensor rank."""
        return self.last_stage and self.tensor_rank == 0

    def total(self, *values: float) -> list[float]:
        """Sums, over the data-parallel replicas, of the values that their speaking ranks pass.

        The values of other ranks are ignored. The result is the same on every rank.
        """
        row = torch.tensor(values if self.speaks else [0.0] * len(values), dtype=torch.float64)
        if self.size == 1:
            return [float(v) for v in row]
        return [float(v) for v in torch.stack(self.gather(row)).sum(0)]

    def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
        """`value` of every rank, in rank order, on the CPU.

        This is deterministic where an all-reduce need not be, and HCCL's all-reduce has no fp64.
        """
        if self.size == 1:
            return [value.cpu()]
        mine = value.contiguous().cpu().reshape(-1).view(torch.uint8).to(self.torch_device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.cpu().view(value.dtype).view(value.shape) for part in parts]

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def gather_stage_objects(self, value: Any) -> list[Any]:
        """`value` of every rank of this pipeline stage, in the order of their `stage_rank`."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * dist.get_world_size(self.stage_group)
        dist.all_gather_object(found, value, group=self.stage_group)
        return found

    def swap(self, sent: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
        """Send sent[i], 1-D and of one dtype, to the stage's rank i.

        Returns the tensor that each sent here, of `lengths`.
        """
        if self.size == 1:
            return sent
        received = sent[0].new_empty(sum(lengths))
        dist.all_to_all_single(received, torch.cat(sent), lengths, [len(t) for t in sent], group=self.stage_group)
        return list(torch.split(received, lengths))

    def barrier(self) -> None:
        if self.size > 1:
            self.gather(torch.zeros(1))


def start(layout: Layout, device: Device, *, seed: int = 42, minutes: float = 30.0) -> World:
    """Join the process group, and lay the ranks out as tensor x data x pipeline.

    Without a launcher that sets ranks it is a group of one. Raises LayoutError when the world is not a multiple of
    tensor x pipeline.
    """
    rank, size, local = launcher_ranks() or (0, 1, 0)
    check_ranks(size, layout)
    torch_device = device.select(local)
    shims.install(device)
    if not dist.is_initialized():
        with contextlib.nullcontext() if launcher_ranks() else _rendezvous_alone():
            dist.init_process_group(device.backend, rank=rank, world_size=size, timeout=timedelta(minutes=minutes))
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return World(
        rank=rank,
        size=size,
        device=device,
        torch_device=torch_device,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=layout.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=layout.pipeline,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        stage_rank=dist.get_rank(parallel_state.get_tensor_and_data_parallel_group()),
        stage_group=parallel_state.get_tensor_and_data_parallel_group(),
    )


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def running(layout: Layout, device: Device, *, seed: int = 42) -> Iterator[World]:
    """`start` and `stop` around a block."""
    try:
        yield start(layout, device, seed=seed)
    finally:
        stop()


def check_ranks(size: int, layout: Layout) -> None:
    """Raise LayoutError unless `size` ranks can be cut into tensor x pipeline x data."""
    model = layout.tensor * layout.pipeline
    if size % model:
        raise LayoutError(
            f"layout.tensor={layout.tensor} x layout.pipeline={layout.pipeline} needs a multiple of {model} ranks, "
            f"{size} were started; start with --ranks {model} or change the layout"
        )


def set_rank(rank: int, size: int, port: int) -> None:
    """Give this process the identity a launcher would give it."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def free_port() -> int:
    """A TCP port of this machine that nobody listens on.

    It lies below the range from which Linux takes the ports of outgoing connections, so that none of these takes it
    before it is used.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise LayoutError(f"no port of {PORTS.start} to {PORTS.stop - 1} is free on this machine; end what listens there")


@contextlib.contextmanager
def _rendezvous_alone() -> Iterator[None]:
    """Give a process that runs alone an address, and not that of a cluster the shell knows.

    The environment is put back afterwards.
    """
    before = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
