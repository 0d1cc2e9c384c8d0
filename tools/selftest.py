"""Check whether this device is sound: operators, collectives, ten training steps, timings.

    python tools/selftest.py --device cuda kernels
    python tools/selftest.py --device npu collectives

Every operator is compared with plain torch, and the training steps with the golden losses. A part prints its findings
and ends with exit code 0 (right), 1 (wrong) or 3 (cannot be done here, and why). `npu_selftest.sh` runs all. It needs
the project's checkout and pytest: the golden losses and the tiny model are those of tests/.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.config import Layout
from megatron_replay.device import Device, choose
from megatron_replay.errors import ReplayError
from megatron_replay.kernels import library
from megatron_replay.kernels.precision import accumulator
from megatron_replay.ops import CandidateSets, linear_cross_entropy, restricted_linear_cross_entropy
from megatron_replay.ops.local_sets import ByColumn
from megatron_replay.ops.shard import shard_of
from megatron_replay.optim import MoClip
from megatron_replay.optim.stats import sums_of_each
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.ranks.spawn import launch

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float64: 1e-12}
"""Largest difference to float64 on the cpu, relative to the largest value.

Inputs are rounded before, so what remains is the difference of sums.
"""
PROBLEMS: dict[str, tuple[list[int], int, int]] = {
    "short sets": ([1 + t % 40 for t in range(50)], 700, 96),
    "sets of all sizes": ([1, 2, 40, 201, 7, 120] * 20, 3000, 1024),
    "a long set": ([65_535, 2], 65_600, 64),
    "few rows, often": ([1] * 3000, 5, 256),
    "an odd width": ([50] * 30, 400, 1537),
    "no positions": ([], 10, 64),
}
"""For the operators of the loss: ids of each position, vocabulary, hidden size."""
GOLDEN_TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3, "npu": 1e-3}
"""Relative, of loss and gradient norm; devices' float32 matrix products may be rounded to fewer bits."""
RANKS = 2
REFERENCE = library.choose("reference")

Run = Callable[[Any, Callable[[Tensor], Tensor]], Sequence[Tensor]]
"""A run of the operators, after putting each input where they compute; it returns its results."""


def kernels(device: Device) -> int:
    """Each operator on the device: the same bits twice, and those of plain torch in float64 on the cpu but for
    rounding."""
    live = library.live(device.name)
    print(f"compiled kernels: {library.EXTENSION}")
    wrong = 0
    for dtype in [torch.float32, torch.bfloat16] + [torch.float64] * device.has_fp64:
        errors: dict[str, float] = {}
        complaints: dict[str, list[str]] = {name: [] for name in live}
        for name, problem, call in cases(dtype, device):
            error, complaint = compared(call, device, TOLERANCE[dtype], again=live[name] != "reference")
            errors[name] = max(error, errors.get(name, 0.0))
            complaints[name] += [f"{problem}: {complaint}"] if complaint else []
        for name, said in complaints.items():
            verdict = f"WRONG: {'; '.join(said)}" if said else f"right: off by {errors[name]:.1e}"
            print(f"{name:22} {str(dtype).removeprefix('torch.'):8} {live[name]:9} {verdict}")
            wrong += bool(said)
    return int(wrong > 0)


def compared(call: Run, device: Device, tolerance: float, *, again: bool) -> tuple[float, str]:
    """(distance of the device's results from float64 on the cpu, the error or "").

    `again`: a second call must give the same bits.
    """
    try:
        found, second = (call(library.choose("auto"), lambda t: t.to(device.at())) for _ in range(2))
    except (RuntimeError, ValueError) as err:
        return float("inf"), f"{type(err).__name__}: {str(err).splitlines()[0]}"
    wanted = call(REFERENCE, lambda t: t.double() if t.is_floating_point() else t)
    error = max(difference(a, b) for a, b in zip(found, wanted, strict=True))
    if not error <= tolerance:
        return error, f"off by {error:.1e}"
    same = all(torch.equal(a, b) for a, b in zip(found, second, strict=True))
    return error, "" if same or not again else "other bits the second time"


def cases(dtype: torch.dtype, device: Device) -> Iterator[tuple[str, str, Run]]:
    """(operator, problem, a call of it), for every operator of kernels/schemas.py."""
    for problem, (sizes, vocab, hidden) in PROBLEMS.items():
        if device.name != "npu" or hidden % 16 == 0:  # the widths that its kernels take
            yield from ((name, problem, call) for name, call in of_the_loss(dtype, sizes, vocab, hidden).items())
    yield from ((name, "5000 columns", call) for name, call in of_the_selection(dtype).items())
    yield from ((name, "three tensors", call) for name, call in of_optimizers(dtype).items())


def of_the_loss(dtype: torch.dtype, sizes: list[int], vocab: int, hidden: int) -> dict[str, Run]:
    """Operator -> a call of it with random inputs, those that come from an earlier operator included."""
    gen = torch.Generator().manual_seed(0)
    n, wide = len(sizes), accumulator(dtype)
    h = torch.randn(n, hidden, generator=gen).to(dtype)
    weight = (torch.randn(vocab, hidden, generator=gen) / 8).to(dtype)
    ids = [torch.randperm(vocab, generator=gen)[:size].tolist() for size in sizes]
    local = CandidateSets.from_lists(ids, [row[0] for row in ids]).local(shard_of(vocab, None))
    offsets, columns, gold = local.offsets, local.columns, local.gold
    z = torch.randn(len(columns), generator=gen).to(wide)
    entries = ByColumn.of(offsets, columns).entries(z)
    scalars = torch.rand(3, n, generator=gen).to(wide)
    scale = torch.rand(2, n, generator=gen).to(wide)
    mixture = torch.randn(n, hidden, generator=gen).to(wide)
    targets = torch.rand(len(columns), generator=gen).to(wide)

    def fwd(ops: Any, on: Any) -> Sequence[Tensor]:
        table = tuple(map(on, (h, weight, offsets, columns, gold)))
        return (*ops.restricted_fwd(*table, True), *ops.restricted_fwd(*table, True, on(targets)))

    def dh(ops: Any, on: Any) -> Sequence[Tensor]:
        table, grads = tuple(map(on, (weight, columns, gold, scale))), (on(mixture).clone(), on(mixture).clone())
        ops.restricted_bwd_dh(grads[0], *table)
        ops.restricted_bwd_dh(grads[1], *table, on(2 * mixture))
        return grads

    def dw(ops: Any, on: Any) -> Sequence[Tensor]:
        grad = on(torch.ones(vocab, hidden, dtype=wide))
        ops.restricted_bwd_dw(*map(on, (h, *entries)), grad)
        return (grad,)

    def rows(ops: Any, on: Any) -> Sequence[Tensor]:
        return (ops.restricted_bwd_rows(*map(on, (h, *entries))),)

    def logits_fwd(ops: Any, on: Any) -> Sequence[Tensor]:
        logits = on(weight)[:, 0].expand(n, -1)
        table = tuple(map(on, (offsets, columns, gold)))
        soft = ops.restricted_logits_fwd(logits, *table, on(targets))
        return (*ops.restricted_logits_fwd(logits, *table), *soft)

    def logits_bwd(ops: Any, on: Any) -> Sequence[Tensor]:
        table, grads = tuple(map(on, (z, offsets, columns, gold, scalars))), on(torch.zeros(2, n, vocab, dtype=wide))
        ops.restricted_logits_bwd(*table, grads[0])
        ops.restricted_logits_bwd(*table, grads[1], on(targets))
        return (grads,)

    return {
        "restricted_fwd": fwd,
        "restricted_bwd_dh": dh,
        "restricted_bwd_dw": dw,
        "restricted_bwd_rows": rows,
        "restricted_logits_fwd": logits_fwd,
        "restricted_logits_bwd": logits_bwd,
    }


def of_the_selection(dtype: torch.dtype) -> dict[str, Run]:
    logits = (torch.randn(50, 5000, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    return {"topk_rows": lambda ops, on: tuple(ops.topk_rows(on(logits), 100))}


def of_optimizers(dtype: torch.dtype) -> dict[str, Run]:
    """The optimizers choose their operators by mode, which `ops` stands for here."""
    gen = torch.Generator().manual_seed(0)
    grads = [torch.randn(size, generator=gen).to(dtype) for size in ((64, 33), (7,), (1000,))]
    momenta = [torch.randn(grad.shape, generator=gen).to(accumulator(dtype)) for grad in grads]

    def mode(ops: Any) -> Literal["auto", "reference"]:
        return "reference" if ops is REFERENCE else "auto"

    def sums(ops: Any, on: Any) -> Sequence[Tensor]:
        return (sums_of_each([on(grad) for grad in grads], [on(m) for m in momenta], mode=mode(ops)),)

    def update(ops: Any, on: Any) -> Sequence[Tensor]:
        weights = [torch.nn.Parameter(on(m).clone()) for m in momenta]
        stepper = MoClip(weights, lr=1e-2, kernels=mode(ops))
        for turn in (1.0, -0.5, 0.25):
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = on(grad.to(accumulator(dtype)) * turn).to(weight.dtype)
            stepper.step()
        return [weight.detach() for weight in weights]

    return {"optimizer_sums": sums, "adam_update": update}


def difference(found: Tensor, wanted: Tensor) -> float:
    """Error as a fraction of the largest value, or infinite where shapes or whole numbers differ."""
    found, wanted = found.cpu(), wanted.cpu()
    if found.shape != wanted.shape or not wanted.is_floating_point() or not wanted.numel():
        return 0.0 if torch.equal(found, wanted.to(found.dtype)) else float("inf")
    worst = (found.double() - wanted).abs().nan_to_num(float("inf")).max()
    return float(worst / wanted.abs().max().clamp(min=1e-30))


def collectives(device: Device) -> int:
    """All-reduce and all-gather between two ranks of this machine."""
    if device.name != "cpu" and device.count() < RANKS:
        print(f"skipped: needs {RANKS} {device.name} devices, {device.count()} here")
        return SKIPPED
    return launch("selftest:collectives_rank", (device.name,), {}, RANKS, device.name)


def collectives_rank(name: str) -> int:
    """On a rank."""
    here = world.start(Layout(), choose(name), minutes=2.0)
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1 << 18, 1 << 22):
            mine = torch.full((size,), float(here.rank + 1), dtype=dtype, device=here.torch_device)
            total, parts = torch.empty_like(mine), [torch.empty_like(mine) for _ in range(here.size)]
            calls: dict[str, Callable[[], Any]] = {
                "all-reduce": partial(reduced, total, mine),
                "all-gather": partial(dist.all_gather, parts, mine),
            }
            for what, call in calls.items():
                seconds = best_of(here.device, call)
                right = bool((total == RANKS * (RANKS + 1) / 2).all()) if what == "all-reduce" else gathered(parts)
                wrong += not right
                if here.is_main:
                    kind = (
                        f"{what} over {here.device.backend} {str(dtype).removeprefix('torch.'):8} "
                        f"{mine.nbytes / 2**20:5.1f} MiB"
                    )
                    print(f"{kind}  {'right' if right else 'WRONG'}  {seconds * 1e3:.2f} ms", flush=True)
    world.stop()
    return int(wrong > 0)


def reduced(total: Tensor, mine: Tensor) -> None:
    dist.all_reduce(total.copy_(mine))


def gathered(parts: Sequence[Tensor]) -> bool:
    return all(bool((part == rank + 1).all()) for rank, part in enumerate(parts))


def golden(device: Device) -> int:
    """Ten steps of a tiny Qwen3 on one rank against tests/golden/qwen3_tiny.txt, which was written on the cpu."""
    sys.path.insert(0, str(ROOT / "tests" / "ranks"))
    import jobs
    import models
    import test_golden

    kept = [
        line.split() for line in test_golden.GOLDEN.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    tolerance, worst = GOLDEN_TOLERANCE[device.name], 0.0
    for loss, tied in test_golden.RUNS:
        wanted = [[float(x) for x in row[3:5]] for row in kept if row[:2] == [loss, "tied" if tied else "untied"]]
        with tempfile.TemporaryDirectory() as folder:
            models.write_folder(Path(folder), {**models.QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": tied})
            found = train(device, folder, loss, jobs)
        error = max(
            abs(a / b - 1)
            for ours, theirs in zip(found, wanted, strict=True)
            for a, b in zip(ours, theirs, strict=True)
        )
        worst = max(worst, error)
        verdict = "right" if error <= tolerance else "WRONG"
        print(
            f"{loss:10} {'tied' if tied else 'untied':6} {verdict}: loss and gradient norm of ten steps off by at "
            f"most {error:.1e}"
        )
    return int(not worst <= tolerance)


def train(device: Device, folder: str, loss: str, jobs: Any) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each of the steps that the golden file holds."""
    from megatron_replay.formats.hf_folder import HFFolder
    from megatron_replay.parallel.mcore.model import build, load_hf
    from megatron_replay.parallel.trainer import make_trainer

    with world.running(Layout(), device) as here:
        source = HFFolder(folder)
        model = build(source.spec, Layout(), here, torch.float32, seq_length=128)
        load_hf(model, source)
        trainer = make_trainer(model, jobs.MOCLIP)
        steps = [
            trainer.step(jobs.batch_of(model, step, jobs.ROWS), jobs.task(model, loss), jobs.LR) for step in range(10)
        ]
    return [(float(step.loss), float(step.grad_norm)) for step in steps]


def timings(device: Device) -> int:
    """Forward and backward of the restricted loss and of the full one, for one tensor-parallel rank of Qwen3-4B.

    The sizes are small on a cpu.
    """
    n, hidden, vocab, k = (128, 256, 4096, 50) if device.name == "cpu" else (4096, 2560, 151_936 // 4, 100)
    dtype = torch.bfloat16 if device.has_bf16 else torch.float32
    gen = torch.Generator().manual_seed(0)
    h = torch.randn(n, hidden, generator=gen).to(device.at(), dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=gen) / hidden**0.5).to(device.at(), dtype).requires_grad_()
    ids = torch.stack([torch.randperm(vocab, generator=gen)[:k] for _ in range(n)])
    sets = CandidateSets.from_lists(ids.tolist(), ids[:, 0].tolist()).to(device.at())
    main_grad, gold = torch.zeros(w.shape, device=device.at()), ids[:, 0].to(device.at())
    losses: dict[str, Callable[[], Tensor]] = {
        "restricted": lambda: restricted_linear_cross_entropy(h, w, sets, main_grad=main_grad),
        "restricted, plain torch": lambda: restricted_linear_cross_entropy(
            h, w, sets, main_grad=main_grad, kernels="reference"
        ),
        "full, chunked": lambda: linear_cross_entropy(h, w, gold),
        "full": lambda: torch.nn.functional.cross_entropy((h @ w.t()).float(), gold, reduction="none"),
    }
    print(f"{n} positions, hidden {hidden}, {vocab} rows, {k} ids a position, {dtype}, {device.model_name()}")
    print("forward and backward, best of five")
    for name, loss in losses.items():

        def step(loss: Callable[[], Tensor] = loss) -> None:
            h.grad = w.grad = None
            loss().mean().backward()

        print(f"{name:25} {best_of(device, step) * 1e3:8.2f} ms")
    return 0


def best_of(device: Device, call: Callable[[], Any], rounds: int = 5) -> float:
    """Seconds of the fastest of so many calls, after one that does not count."""
    took = []
    for _ in range(rounds + 1):
        device.synchronize()
        began = time.perf_counter()
        call()
        device.synchronize()
        took.append(time.perf_counter() - began)
    return min(took[1:])


PARTS: dict[str, Callable[[Device], int]] = {
    "kernels": kernels,
    "collectives": collectives,
    "golden": golden,
    "timings": timings,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "npu"))
    args = parser.parse_args()
    try:
        return PARTS[args.part](choose(args.device))
    except ReplayError as err:
        print(f"WRONG: {err}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
