"""Estimated times on an Ascend 910B3 from the stand-in's counters. Not a measurement: nothing here has run on a device.

    python tests/ascend/estimate.py      prints the table of docs/ascend-kernels.md

The pipes of a core work side by side. So a core takes as long as its slowest pipe, and a kernel as long as its slowest
core:

    HBM          bytes in and out / (bandwidth / cores)
    MTE2, MTE3   bytes / (bandwidth / cores) + ISSUE cycles an instruction
    V            one cycle a repeat of 256 bytes + START cycles an instruction
    S            SCALAR cycles an instruction + WAIT for each flag it waits for

Cores, clock and bandwidth are those of CANN's platform file for the chip; ISSUE, START, SCALAR and WAIT are assumptions
of ours.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import (
    CHUNK,
    logits_bwd,
    logits_fwd,
    moclip_stats,
    moclip_update,
    restricted_bwd_dh,
    restricted_bwd_dw,
    restricted_fwd,
    sets,
    topk,
)
from stand_in import Library, build, build_core

CORES, CLOCK, HBM = 40, 1.8e9, 1.6e12
ISSUE, START, SCALAR, WAIT = 32, 16, 4, 0.5e-6
LOW = torch.bfloat16


def pipe_seconds(counters: dict[str, int]) -> dict[str, float]:
    """Estimated busy time of each pipe of one core, and of its share of the memory."""
    moved = {
        pipe: counters[f"{pipe}_bytes"] / (HBM / CORES) + ISSUE * counters[pipe] / CLOCK for pipe in ("mte2", "mte3")
    }
    hbm = (counters["mte2_bytes"] + counters["mte3_bytes"]) / (HBM / CORES)
    vector = (counters["repeats"] + START * counters["v"]) / CLOCK
    return {"hbm": hbm, **moved, "v": vector, "s": SCALAR * counters["s"] / CLOCK + WAIT * counters["scalar_waits"]}


def kernel_seconds(cores: Sequence[dict[str, int]]) -> float:
    """Estimated time of a kernel from the counters of its cores."""
    return max((max(pipe_seconds(counters).values()) for counters in cores), default=0.0)


def row(name: str, library: Library, times: float, kernel: int = 0) -> str:
    """A line of the table for a core whose load was a `times`-th of what it is to have."""
    seconds = {pipe: times * value * 1e3 for pipe, value in pipe_seconds(library.counters(0, kernel)).items()}
    slowest = max(seconds, key=lambda pipe: seconds[pipe])
    return (
        f"| {name} | {max(seconds.values()):.2f} | {slowest.upper()} | "
        + " | ".join(f"{seconds[p]:.2f}" for p in ("hbm", "mte2", "v", "mte3", "s"))
        + " |"
    )


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    library = Library(build(folder, build_core(folder)))
    print(
        "| kernel and load | estimate, ms | bound by | HBM | MTE2 | V | MTE3 | S |\n|---|---|---|---|---|---|---|---|"
    )
    for model, width in (("4B", 2560), ("8B", 4096)):
        # one core's part of 4,096 positions with 25 candidates here each, of which one in three touches a row first
        positions, load = 26, 102.4 / 26
        x = sets([25] * positions, 200, width, LOW)
        coefficient, stats = torch.ones(len(x.columns)), torch.ones(3, positions)
        restricted_fwd(library, x, blocks=1)
        print(row(f"{model}: restricted_fwd", library, load))
        restricted_fwd(library, x, mix=False, blocks=1)
        print(row(f"{model}: restricted_fwd, no mixture", library, load))
        restricted_fwd(library, replace(x, targets=coefficient), blocks=1)
        print(row(f"{model}: restricted_fwd, targets", library, load))
        restricted_bwd_dh(library, x, torch.zeros(positions, width), stats[:2].contiguous(), blocks=1)
        print(row(f"{model}: restricted_bwd_dh", library, load))
        restricted_bwd_dw(library, x, coefficient, torch.zeros(200, width), blocks=1)
        print(row(f"{model}: restricted_bwd_dw", library, load))
    logits = torch.randn(positions, 37_984, generator=torch.Generator().manual_seed(0)).to(LOW)
    x = sets([25] * positions, 37_984, 16, LOW)
    z, stats = logits_fwd(library, logits, x, blocks=1)
    print(row("vocabulary 151,936, TP4: logits_fwd", library, load))
    logits_bwd(library, z, x, stats, LOW, blocks=1)
    print(row("vocabulary 151,936, TP4: logits_bwd", library, load))
    topk(library, logits, 200, blocks=1)
    print(row("vocabulary 151,936, TP4: topk, k = 200", library, load))
    length = 4 * CHUNK
    tensors = [torch.randn(length) for _ in range(3)] + [torch.rand(length)]
    moclip_stats(library, tensors[1], tensors[2], blocks=1)
    print(row("10^9 parameters, float32: moclip_stats", library, 1e9 / CORES / length))
    moclip_update(library, tensors, [0.9, 0.1, 0.2, 0, 0.95, 1.5, 1, 0, 1, 0.01], True, True, blocks=1)
    print(row("10^9 parameters, float32: moclip_update", library, 1e9 / CORES / length))


if __name__ == "__main__":
    main()
