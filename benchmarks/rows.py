"""Synthetic logits, interleaved rounds, memory and rows of a table, for the benchmarks of operators."""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_replay.ops import CandidateSets, dynamic_topk

Step = Callable[[], object]


def language_logits(
    num: int, vocab: int, *, sigma: float = 2.5, exponent: float = 1.05, rank: int = 64, seed: int = 0
) -> Iterator[Tensor]:
    """Logits of a log-bilinear language model, 128 rows at a time.

    Shuffled ids follow Zipf's law. A direction of each document and position lifts some of them; rows differ in
    sharpness. sigma and exponent give sets like those of real text.
    """
    gen = torch.Generator().manual_seed(seed)
    base = -exponent * (torch.arange(vocab) + 2.7).log()[torch.randperm(vocab, generator=gen)]
    embedding = torch.randn(vocab, rank, generator=gen)
    context = torch.randn(rank, generator=gen) / math.sqrt(rank)
    for start in range(0, num, 128):
        if start % 256 == 0:
            topic = torch.randn(rank, generator=gen) / math.sqrt(rank)
        rows = []
        for _ in range(min(128, num - start)):
            context = 0.6 * context + 0.8 * torch.randn(rank, generator=gen) / math.sqrt(rank)
            rows.append(0.5 * topic + 0.87 * context)
        sharpness = (0.35 * torch.randn(len(rows), 1, generator=gen)).exp()
        yield (base + sigma * torch.stack(rows) @ embedding.t()) * sharpness


def sets_of(tiles: Iterable[Tensor], tau: float, gen: torch.Generator) -> CandidateSets:
    """The candidate sets (k_max 200) of logits, with gold ids drawn from their own probabilities."""
    return CandidateSets.cat(
        [dynamic_topk(rows, torch.multinomial(rows.softmax(1), 1, generator=gen)[:, 0], tau, 200) for rows in tiles]
    )


def interleaved(
    steps: Mapping[str, Step], rounds: Mapping[str, int], threads: int, *, processor: bool = True
) -> dict[str, list[float]]:
    """Seconds of each step in each of its rounds, the steps in turn.

    A first round does not count, and is left out for those that run once. With one thread processor time counts, so
    that neighbours on the machine do not. With more threads, or where `processor` is false because the work is a
    device's, the wall clock does.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 and processor else time.perf_counter
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(rounds.values()) + 1):
        for name, step in steps.items():
            if turn > rounds[name] or (turn == 0 and rounds[name] == 1):
                continue
            start = clock()
            step()
            if turn:
                found[name].append(clock() - start)
    return found


def temporary_bytes(step: Step) -> int:
    """Peak resident memory of a step above what is held when it is over.

    This holds only where freed memory is returned at once, see `frugal`.
    """
    Path("/proc/self/clear_refs").write_text("5")
    result = step()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    del result
    return 1024 * (int(status["VmHWM"].split()[0]) - int(status["VmRSS"].split()[0]))


def frugal(arguments: list[str]) -> str:
    """The output of this program with other arguments, in a process of its own.

    Its allocator maps and returns every block of 64 KB or more.
    """
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_MMAP_MAX_": "1000000",
    }
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True).stdout


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "min_ms": f"{min(seconds) * 1e3:.2f}",
        "median_ms": f"{statistics.median(seconds) * 1e3:.2f}",
        "rounds": len(seconds),
    }


def options(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=1, help="of methods that take seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="these methods, beside ours")
    parser.add_argument("--output", type=Path, help="append rows to this file; without it they are printed")
    return parser


def write(rows: list[dict[str, Any]], table: str, output: Path | None) -> None:
    command = " ".join(
        ["python benchmarks/run.py", table, *(a for a in sys.argv[1:] if a != "--output" and a != str(output))]
    )
    append([{**about(command, machine()), **row} for row in rows], output)


def append(rows: list[dict[str, Any]], output: Path | None) -> None:
    """Add rows of one form to a table, which gets a header when it is new, or print them."""
    new = output is None or not output.exists()
    with output.open("a", newline="") if output else nullcontext(sys.stdout) as file:
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            out.writeheader()
        out.writerows(rows)


def about(command: str, machine: str) -> dict[str, str]:
    """The first columns of every table."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return {"date": datetime.date.today().isoformat(), "commit": commit, "command": command, "machine": machine}


def processor() -> str:
    """The processor's model, as far as it is told, and nothing else of the machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return told or "unknown processor"


def machine() -> str:
    """The processor, the instruction set that torch takes, and torch's version."""
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
