"""A trial of two processes on this machine, which talk to each other through everything that a run's ranks use."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_replay.config import Layout
from megatron_replay.device import CPU, Device, choose
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.ranks.spawn import launch

RANKS = 2
NUMBERS = 1 << 20
"""Elements of the tensor that is summed: 4 MiB."""


def try_all_reduce(device: Device) -> dict[str, Any]:
    """Start two ranks, form megatron's groups and sum a tensor. A machine with one accelerator tries it on the CPU.

    Keys of the result: ok, ranks, device, backend, start_seconds (from nothing to groups), seconds (of one all-reduce
    of 4 MiB), error ("" when ok).
    """
    where = device if device.name == "cpu" or device.count() >= RANKS else CPU
    result: dict[str, Any] = {"ok": False, "ranks": RANKS, "device": where.name, "backend": where.backend}
    result |= {"start_seconds": None, "seconds": None, "error": ""}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            code = launch(f"{__name__}:all_reduce", (folder, where.name, time.time()), {}, RANKS, where.name)
        except Exception as err:  # any reason why two ranks cannot start is the finding
            return {**result, "error": _line(err)}
        answers = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(folder).glob("rank-*.json"))]
    errors = [answer["error"] for answer in answers if answer["error"]]
    if errors or code or len(answers) != RANKS:
        silent = (
            f"{len(answers)} of {RANKS} ranks answered within {time.perf_counter() - began:.0f} s, exit code {code}"
        )
        return {**result, "error": errors[0] if errors else silent}
    slowest = {key: max(answer[key] for answer in answers) for key in ("start_seconds", "seconds")}
    return {**result, **slowest, "ok": True}


def all_reduce(folder: str, device: str, began: float) -> int:
    """On a rank: write the outcome to `folder`, and return 1 when it failed."""
    answer: dict[str, Any] = {"error": ""}
    rank = "unknown"
    try:
        here = world.start(Layout(), choose(device), minutes=1.0)
        rank = str(here.rank)
        answer["start_seconds"] = time.time() - began
        answer["seconds"] = _timed_sum(here)
        world.stop()
    except Exception as err:
        answer["error"] = _line(err)
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    return int(bool(answer["error"]))


def _timed_sum(here: world.World) -> float:
    """Seconds of one all-reduce, the best of three. Raises RuntimeError for a wrong sum."""
    took = []
    for _ in range(3):
        values = torch.full((NUMBERS,), float(here.rank + 1), device=here.torch_device)
        here.device.synchronize()
        began = time.perf_counter()
        dist.all_reduce(values, group=here.data_group)
        here.device.synchronize()
        took.append(time.perf_counter() - began)
        wanted = RANKS * (RANKS + 1) / 2
        if not bool((values == wanted).all()):
            raise RuntimeError(f"the sum over {RANKS} ranks is {float(values[0])}, expected {wanted}")
    return min(took)


def _line(err: Exception) -> str:
    text = str(err).strip().splitlines()
    return f"{type(err).__name__}: {text[0]}" if text else type(err).__name__
