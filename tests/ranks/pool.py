"""Gloo ranks for tests, forked from one process that has imported torch and megatron once.

`Pool(world).run(fn, *args)` calls `fn` on every rank of a standing pool (milliseconds a call; for operators).
`fresh(world, fn, *args)` forks new ranks for one call (a second or so; for models, whose layout is process-wide).
Both return results in rank order, and report a rank that failed or died by name within seconds.
"""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_replay.parallel import shims
from megatron_replay.parallel.ranks import world


def _serve(rank: int, size: int, store: str, inbox: Any, outbox: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    while (job := inbox.get()) is not None:
        function, args = job
        try:
            outbox.put((rank, function(*args), None))
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


def _once(
    rank: int, size: int, port: int, outbox: Any, quiet: bool, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    world.set_rank(rank, size, port)
    # megatron's checkpoint writer forks a helper
    mp.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        answer = (rank, function(*args), None)
    except BaseException:
        answer = (rank, None, traceback.format_exc())
    outbox.put(answer)
    outbox.close()
    outbox.join_thread()
    os._exit(0)


def fresh(size: int, function: Callable[..., Any], *args: Any, within: float = 120.0, quiet: bool = True) -> list[Any]:
    """Fork `size` ranks for one call of `function`; their results in rank order.

    AssertionError names the ranks that failed.
    """
    shims.import_megatron()
    importlib.import_module("torch._dynamo")  # torch's optimizers import it when made: a second in every rank
    context = mp.get_context("fork")
    outbox = context.Queue()
    port = world.free_port()
    processes = [
        context.Process(target=_once, args=(r, size, port, outbox, quiet, function, args), daemon=True)
        for r in range(size)
    ]
    for process in processes:
        process.start()
    try:
        return _collect(processes, outbox, size, within)
    finally:
        for process in processes:
            process.kill()
            process.join()


class Pool:
    """Standing ranks; started at the first `run`, restarted after a failure."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, within: float = 60.0) -> list[Any]:
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, args))
        try:
            return _collect(self._processes, self._outbox, self.size, within)
        except AssertionError:
            self.close(kill=True)
            raise

    def close(self, *, kill: bool = False) -> None:
        for process, inbox in zip(self._processes, getattr(self, "_inboxes", []), strict=False):
            process.kill() if kill else inbox.put(None)
        for process in self._processes:
            process.join(10)
        if self._processes:
            self._folder.cleanup()
        self._processes = []

    def _start(self) -> None:
        shims.import_megatron()
        context = mp.get_context("fork")
        self._folder = tempfile.TemporaryDirectory()
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(self.size)]
        self._processes = [
            context.Process(
                target=_serve, args=(r, self.size, f"{self._folder.name}/store", box, self._outbox), daemon=True
            )
            for r, box in enumerate(self._inboxes)
        ]
        for process in self._processes:
            process.start()


def _collect(processes: list[Any], outbox: Any, size: int, within: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + within
    while len(results) + len(errors) < size and time.monotonic() < deadline:
        try:
            rank, result, error = outbox.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(processes) if not p.is_alive() and r not in results and r not in errors]
            if dead and outbox.empty():
                errors.update({r: f"died with exit code {processes[r].exitcode}" for r in dead})
                deadline = min(deadline, time.monotonic() + 2.0)
            continue
        if error is None:
            results[rank] = result
        else:
            errors[rank] = error
            deadline = min(deadline, time.monotonic() + 2.0)  # the others may wait on this rank for ever
    silent = sorted(set(range(size)) - set(results) - set(errors))
    if errors or silent:
        waiting = f"ranks {silent} were still waiting\n" if silent else ""
        raise AssertionError(waiting + "\n".join(f"rank {r}: {e}" for r, e in sorted(errors.items())))
    return [results[r] for r in range(size)]
