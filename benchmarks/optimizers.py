"""Measure time and bytes a parameter of every optimizer, against torch's own, in one run.

    OMP_WAIT_POLICY=passive python benchmarks/optimizers.py --output benchmarks/results/optimizers.csv

There are 16 M float32 parameters in 8 matrices. Every optimizer steps the same parameters with the same gradients and
keeps a state of its own. The rounds are interleaved (each optimizer once a round), so that neighbours on the machine
disturb all alike. Optimizers that take more than the one
pass of Adam's family (MoFO, those of matrices) are timed in one round only. With one thread the processor time of
this process counts, with more the wall clock does.

`ratio` is to torch's fused AdamW plus a pass for the gradient norm, which every optimizer of ours takes as well. It is
minima over minima, and the median of the rounds' own ratios. `traffic` is counted, not measured: float32 numbers read
and written in the passes over memory. `state` is what the optimizer keeps.

Waiting threads must not spin (OMP_WAIT_POLICY). With a neighbour on one of two cores, a barrier for each of the many
operations of the reference forms then costs a time slice. They look 30 times slower than they are.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rows import about, machine
from torch import Tensor

from megatron_replay.kernels.library import live
from megatron_replay.optim import OPTIMIZERS, ReplayOptimizer, build_optimizer
from megatron_replay.optim.adam import AdamFamily, kernel_knows

SHAPE = (1000, 2000)
BASE = "torch fused AdamW + norm"
HEADER = ("date", "commit", "command", "machine", "optimizer", "threads", "metric", "value", "unit")
NEEDS_A_MODEL = ("muonclip",)
"""Optimizers that ask a model for more than its gradients; Muon's time is theirs too."""
TRAFFIC = {
    "torch fused AdamW": 28,
    BASE: 32,
    "adamw compiled": 32,
    "adam_atan2 compiled": 32,
    "moclip compiled": 36,
    "tam compiled": 36,
}


class Rival(NamedTuple):
    """One row of the table."""

    name: str
    step: Callable[[], object]
    state: Callable[[], int]
    """Bytes it keeps."""
    slow: bool = False


class ForeachMoClip:
    """MoClip (global scope, signed, 45 degrees) as one would write it with torch._foreach: a pass over memory for each
    operation."""

    def __init__(self, params: list[Tensor], lr: float) -> None:
        self.params, self.lr, self.t = params, lr, 0
        self.m, self.v = ([torch.zeros_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def step(self) -> None:
        beta1, beta2, self.t = 0.9, 0.95, self.t + 1
        grads = [p.grad for p in self.params]
        c = float(torch.stack([p.sum() for p in torch._foreach_mul(self.m, grads)]).sum())
        mm = math.hypot(*(float(n) for n in torch._foreach_norm(self.m)))
        gg = math.hypot(*(float(n) for n in torch._foreach_norm(grads)))
        x = c / (mm * gg) if mm else 1.0
        a = min(1.0, abs(x) / math.sqrt(1 - x * x)) if x < math.cos(math.pi / 4) else 1.0
        torch._foreach_mul_(self.m, beta1 + (1 - beta1) * ((1 - a) * c / mm**2 if mm else 0.0))
        torch._foreach_add_(self.m, grads, alpha=(1 - beta1) * a)
        torch._foreach_mul_(self.v, beta2)
        torch._foreach_addcmul_(self.v, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(self.v)
        up = torch._foreach_mul(self.m, math.sqrt(1 - beta2**self.t) / (1 - beta1**self.t))
        torch._foreach_mul_(self.params, 1 - self.lr * 0.1)
        torch._foreach_add_(self.params, [torch.atan2(y, x) for y, x in zip(up, root, strict=True)], alpha=-self.lr)


def state_bytes(opt: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for state in opt.state.values() for v in state.values() if isinstance(v, Tensor))


def rivals(params: list[torch.nn.Parameter]) -> list[Rival]:
    lr, grads = 1e-4, [p.grad for p in params]
    adam = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.1}
    fused, foreach = torch.optim.AdamW(params, fused=True, **adam), torch.optim.AdamW(params, foreach=True, **adam)
    muon = torch.optim.Muon(params, lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    plain = ForeachMoClip(list(params), lr)

    def with_norm() -> None:
        torch._foreach_norm(grads)
        fused.step()

    def ours(name: str, mode: str = "auto", slow: bool = False) -> Rival:
        opt: ReplayOptimizer = build_optimizer(name, params, lr, kernels=mode)
        label = name if slow else f"{name} {'reference' if mode == 'reference' else live()['adam_update']}"
        return Rival(label, opt.step, lambda: state_bytes(opt), slow)

    table = [
        Rival(BASE, with_norm, lambda: state_bytes(fused)),
        Rival("torch fused AdamW", fused.step, lambda: state_bytes(fused)),
        Rival("torch foreach AdamW", foreach.step, lambda: state_bytes(foreach)),
        Rival("foreach MoClip", plain.step, lambda: sum(v.nbytes for v in [*plain.m, *plain.v])),
    ]
    table += [ours(name, mode) for name in OPTIMIZERS if one_pass(name) for mode in ("auto", "reference")]
    table += [Rival("torch Muon", muon.step, lambda: state_bytes(muon), slow=True)]
    return table + [ours(name, slow=True) for name in OPTIMIZERS if not one_pass(name) and name not in NEEDS_A_MODEL]


def one_pass(name: str) -> bool:
    """True where an optimizer updates all parameters in the one pass for which Adam's family has a kernel."""
    kind = OPTIMIZERS.get(name)
    return issubclass(kind, AdamFamily) and kind.apply is AdamFamily.apply and kernel_knows(kind)


def timed(table: list[Rival], threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each rival in each round, after one that does not count."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    found: dict[str, list[float]] = {rival.name: [] for rival in table}
    for turn in range(rounds + 1):
        for rival in table:
            if rival.slow and turn > 1:
                continue
            start = clock()
            rival.step()
            if turn:
                found[rival.name].append(clock() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--without-slow", action="store_true", help="leave out the matrix optimizers")
    parser.add_argument("--output", type=Path, help="append rows to this file; without it they are printed")
    args = parser.parse_args()
    gen = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(SHAPE, generator=gen)) for _ in range(8)]
    for p in params:
        p.grad = torch.randn(SHAPE, generator=gen)
    table = [rival for rival in rivals(params) if not (rival.slow and args.without_slow)]
    num = sum(p.numel() for p in params)
    rows: list[tuple[str, int, str, float, str]] = []
    for threads in args.threads:
        found = timed(table, threads, args.rounds)
        for name, seconds in found.items():
            paired = [s / base for s, base in zip(seconds, found[BASE], strict=False)]
            rows.append((name, threads, "time a parameter, minimum", min(seconds) / num * 1e9, "ns"))
            rows.append((name, threads, "ratio of minima", min(seconds) / min(found[BASE]), "x"))
            rows.append((name, threads, "ratio, median of rounds", statistics.median(paired), "x"))
    rows += [(rival.name, 0, "state a parameter", rival.state() / num, "bytes") for rival in table]
    rows += [
        (name, 0, "traffic a parameter", traffic, "bytes")
        for name, traffic in TRAFFIC.items()
        if name in {r.name for r in table}
    ]
    write(rows, args)


def write(rows: list[tuple[str, int, str, float, str]], args: argparse.Namespace) -> None:
    threads = " ".join(map(str, args.threads))
    policy = f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'active')}"
    slow = " --without-slow" * args.without_slow
    command = f"{policy} python benchmarks/optimizers.py --rounds {args.rounds} --threads {threads}{slow}"
    common = about(command, machine()).values()
    new = args.output is not None and not args.output.exists()
    with args.output.open("a", newline="") if args.output else sys.stdout as file:
        out = csv.writer(file, lineterminator="\n")
        if new or not args.output:
            out.writerow(HEADER)
        out.writerows(
            (*common, name, threads or "", metric, f"{value:.4g}", unit) for name, threads, metric, value, unit in rows
        )


if __name__ == "__main__":
    main()
