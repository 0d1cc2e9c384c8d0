"""One report from a machine with a GPU: every Triton kernel against plain torch in float64, and what a step of the loss takes.

    python tools/cuda_selftest.py
    python tools/cuda_selftest.py --device cpu --positions 64 --vocab 5000    # the script itself, on the compiled CPU kernels

Exits with 1 when a kernel is wrong, gives other bits the second time, or is not live on the device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_replay.device import Device, choose
from megatron_replay.ops import CandidateSets, VocabShard, kernels, live, restricted_linear_cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float64: 1e-12}
"""Of the norm; both sides see the same rounded inputs, and sums are float32 for bfloat16."""


def sets_of(sizes: list[int], vocab: int) -> CandidateSets:
    """Sets of about these sizes; low ids are in most of them (the logarithm of an id is uniform)."""
    gen = torch.Generator().manual_seed(0)
    rows = [(vocab ** torch.rand(size, generator=gen)).long().sub(1).clamp(0, vocab - 1).unique().tolist() for size in sizes]
    return CandidateSets.from_lists(rows, [row[len(row) // 2] for row in rows])


def results(mode: str, hidden: Tensor, weight: Tensor, sets: CandidateSets) -> dict[str, Tensor]:
    """What every operator gives; the backward ones are fed what the forward one of plain torch gives."""
    ops, plain = kernels(mode), kernels("reference")
    here = sets.local(VocabShard(0, weight.shape[0])).indexed().to(hidden.device)
    table = (here.offsets, here.columns, here.gold)
    z, stats, mixture = ops.restricted_fwd(hidden, weight, *table, True)
    fed, peaks, grad_hidden = plain.restricted_fwd(hidden, weight, *table, True)
    ops.restricted_bwd_dh(grad_hidden, weight, here.columns, here.gold, peaks[:2].clamp(0.1, 2).contiguous())
    assert here.by_column is not None
    entries, grad_weight = (hidden, *here.by_column.entries(fed)), torch.ones_like(weight, dtype=fed.dtype)
    ops.restricted_bwd_dw(*entries, grad_weight)
    rows = ops.restricted_bwd_rows(*entries)
    logits = weight[:, 0].expand(len(hidden), -1)  # without a rounding of its own
    picked, picked_stats = ops.restricted_logits_fwd(logits, *table)
    grad_logits = torch.zeros(logits.shape, dtype=fed.dtype, device=fed.device)
    chosen, scalars = plain.restricted_logits_fwd(logits, *table)
    scalars[1:] = 0.5  # not a sum, which plain torch has in another order
    ops.restricted_logits_bwd(chosen, *table, scalars, grad_logits)
    found = {"z": z, "max, sum, gold": stats, "mixture": mixture, "bwd_dh": grad_hidden, "bwd_dw": grad_weight}
    return {**found, "bwd_rows": rows, "logits_fwd": picked, "of logits": picked_stats, "logits_bwd": grad_logits}


def check(device: Device) -> bool:
    cases = {
        "random": (sets_of([1, 2, 40, 201, 7, 120] * 20, 3000), 3000, 1024),
        "one id each": (CandidateSets.from_lists([[t % 5] for t in range(3000)], [t % 5 for t in range(3000)]), 50, 256),
        "odd width": (sets_of([50] * 30, 400), 400, 1537),
        "65,535 ids": (CandidateSets.from_lists([range(65_535), [3, 9]], [65_534, 9]), 65_600, 64),
        "no positions": (sets_of([], 10), 10, 64),
    }
    good = True
    for name, (sets, vocab, width) in cases.items():
        for dtype, tolerance in TOLERANCE.items():
            gen = torch.Generator().manual_seed(1)
            hidden, weight = (torch.randn(n, width, generator=gen).to(dtype).to(device.at()) for n in (sets.num_positions, vocab))
            ours, again = (results("auto", hidden, weight, sets) for _ in range(2))
            exact = results("reference", hidden.double(), weight.double(), sets)
            errors = {k: float((ours[k].double() - exact[k]).norm() / exact[k].double().norm().clamp(min=1e-30)) for k in exact}
            wrong = [f"{k} is off by {error:.1e}" for k, error in errors.items() if not error <= tolerance]
            wrong += [f"{k} differs the second time" for k in ours if not torch.equal(ours[k], again[k])]
            print(f"{name:14} {dtype!s:15} largest error {max(errors.values()):.1e}  {'; '.join(wrong) or 'ok'}")
            good &= not wrong
    return good


def timed(step: Callable[[], None], device: Device, rounds: int = 10) -> float:
    """Median milliseconds, after two rounds to compile and warm up."""
    took = []
    for _ in range(rounds + 2):
        device.synchronize()
        start = time.perf_counter()
        step()
        device.synchronize()
        took.append(1e3 * (time.perf_counter() - start))
    return statistics.median(took[2:])


def times(device: Device, positions: int, vocab: int, width: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(2)
    sets = sets_of(torch.randint(1, 202, (positions,), generator=gen).tolist(), vocab)
    hidden, weight = (torch.randn(n, width, generator=gen).mul(0.02).to(dtype).to(device.at()).requires_grad_() for n in (positions, vocab))
    main_grad, gold = torch.zeros_like(weight, dtype=torch.float32), sets.gold().to(device.at())

    def restricted(mode: str) -> None:
        hidden.grad = None
        restricted_linear_cross_entropy(hidden, weight, sets, main_grad=main_grad, kernels=mode).mean().backward()

    def full() -> None:
        hidden.grad = weight.grad = None
        cross_entropy((hidden @ weight.t()).float(), gold).backward()

    print(f"\n{positions} positions, V {vocab}, H {width}, {dtype}; {len(sets.ids)} candidates, {len(sets.ids.unique())} distinct")
    steps = {"restricted, auto": lambda: restricted("auto"), "restricted, reference": lambda: restricted("reference"), "full logits": full}
    for name, step in steps.items():
        print(f"{name:24} {timed(step, device):9.3f} ms forward + backward")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2560)
    args = parser.parse_args()
    device = choose(args.device)
    answering = live(device.name)
    print(f"{device.model_name()}, torch {torch.__version__}\nlive: {answering}")
    good = check(device) and "reference" not in {answering[name] for name in answering if name != "topk_rows"}
    for dtype in (torch.bfloat16, torch.float32):
        times(device, args.positions, args.vocab, args.hidden, dtype)
    print("\nall right" if good else "\nNOT right: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
