"""Start a function on N local processes and wait for them, as `--ranks N` does.

On the CPU the ranks are forked after torch and megatron are imported, so N ranks cost one import. The first rank that
fails ends the others, and is named.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from megatron_replay.device import choose
from megatron_replay.errors import ReplayError
from megatron_replay.parallel import shims
from megatron_replay.parallel.ranks import world

GRACE = 5.0
"""Seconds that the other ranks get to stop by themselves after one failed."""


def launch(target: str, args: Sequence[Any], kwargs: dict[str, Any], ranks: int, device: str = "auto") -> int:
    """Call `module:function` with args and kwargs on `ranks` processes of this machine; returns one exit code.

    - 0: every rank finished.
    - 2: a rank met wrong input, which is printed once.
    - 1: a rank failed.
    - 128 + n: stopped by signal n, which every rank received.
    """
    found = choose(device)
    if found.name == "cpu":
        shims.import_megatron()
    context: Any = mp.get_context("fork" if found.name == "cpu" else "spawn")
    port = world.free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(
            target=_rank, args=(rank, ranks, port, pipes[rank][1], target, args, kwargs), name=f"rank {rank}"
        )
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    with _passing_on_signals(processes) as stopped:
        messages = _wait(processes, [receiver for receiver, _ in pipes])
    return _verdict(processes, messages, stopped)


def _rank(
    rank: int, size: int, port: int, sender: Any, target: str, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    # Ctrl-C must reach the launcher alone, which passes it on once, because a second signal means stop at once
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    world.set_rank(rank, size, port)
    module, _, function = target.partition(":")
    code, message = 0, ""
    try:
        code = _call(getattr(importlib.import_module(module), function), args, kwargs)
    except ReplayError as err:
        code, message = 2, str(err)
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else 1
    except BaseException:
        code, message = 1, traceback.format_exc()
    sender.send(message)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # skips the interpreter's shutdown, where a peer's death can leave gloo's threads waiting


def _end_with(parent: int) -> None:
    """End this rank with the launcher, however that ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    result = function(*args, **kwargs)
    return result if isinstance(result, int) else 0


@contextlib.contextmanager
def _passing_on_signals(processes: list[Any]) -> Iterator[list[int]]:
    """The signals received in the block, each passed on to every rank. The handlers are put back afterwards."""
    received: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[Any], receivers: list[Any]) -> list[str]:
    """The last message of each rank. Ranks that outlive a failed one by GRACE seconds are ended."""
    messages = [""] * len(processes)
    deadline: float | None = None
    while any(process.is_alive() for process in processes):
        for rank, receiver in enumerate(receivers):
            messages[rank] = messages[rank] or _said(receiver)
        if deadline is None and any(process.exitcode not in (None, 0) for process in processes):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        multiprocessing.connection.wait([process.sentinel for process in processes if process.is_alive()], timeout=0.2)
    for process in processes:
        process.join()
    return [message or _said(receiver) for message, receiver in zip(messages, receivers, strict=True)]


def _said(receiver: Any) -> str:
    try:
        return str(receiver.recv()) if receiver.poll() else ""
    except EOFError:
        return ""


def _verdict(processes: list[Any], messages: list[str], stopped: list[int]) -> int:
    if stopped:
        return 128 + stopped[0]
    wrong = [m for p, m in zip(processes, messages, strict=True) if p.exitcode == 2]
    if wrong:
        for line in dict.fromkeys(wrong):
            print(f"megatron-replay: {line}", file=sys.stderr)
        return 2
    failed = [(p, m) for p, m in zip(processes, messages, strict=True) if p.exitcode != 0]
    # A rank that only saw its peer vanish says so at length. Show the first cause, and only name the rest.
    causes = [
        (p, m) for p, m in failed if m and "Connection closed by peer" not in m and "connection reset" not in m.lower()
    ] or failed
    for process, message in causes[:1]:
        print(f"{process.name} failed (exit code {process.exitcode})\n{message}", file=sys.stderr)
    if len(failed) > 1:
        print("stopped with it: " + ", ".join(p.name for p, _ in failed if p is not causes[0][0]), file=sys.stderr)
    return 1 if failed else max(p.exitcode for p in processes)
