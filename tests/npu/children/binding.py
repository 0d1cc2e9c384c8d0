# ruff: noqa: E402 (the extension must be there before the package looks for it)
"""Our operators on npu:0 tensors, through torch-npu's dispatch and OpCommand into our binding, against the same
operators on the cpu.

The extension is the file given as argument, under the name the package looks for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from extension import load

load(sys.argv[1])

from hostmath import NPU, HostMath, serve_the_binding

from megatron_replay.kernels import library
from megatron_replay.kernels.library import choose
from megatron_replay.ops import (
    CandidateSets,
    LocalSets,
    VocabShard,
    restricted_cross_entropy,
    restricted_linear_cross_entropy,
)
from megatron_replay.ops.local_sets import ByColumn
from megatron_replay.optim import MoClip

N, HIDDEN, VOCAB = 9, 32, 70
KEPT = serve_the_binding()


def sets() -> CandidateSets:
    """Sets of one to eleven ids, one column in nearly all."""
    rows = [sorted({3, *torch.randperm(VOCAB)[: 1 + (7 * t) % 11].tolist()}) for t in range(N)]
    return CandidateSets.from_lists(rows, [row[t % len(row)] for t, row in enumerate(rows)])


def far(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the largest value."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().double()
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)) if theirs.numel() else 0.0


def aimed() -> LocalSets:
    """The sets with targets."""
    chosen, gen = sets(), torch.Generator().manual_seed(5)
    return chosen.local(VocabShard(0, VOCAB), targets=torch.rand(len(chosen.ids), generator=gen))


def loss_and_gradients(dtype: torch.dtype, *, into: bool = False, soft: bool = False) -> list[float]:
    torch.manual_seed(0)
    hidden, weight, chosen = torch.randn(N, HIDDEN), torch.randn(VOCAB, HIDDEN), aimed() if soft else sets()
    results = []
    for device in ("cpu", NPU):
        h, w = (x.to(dtype).to(device).clone().requires_grad_() for x in (hidden, weight))
        main = torch.ones(VOCAB, HIDDEN, device=device) if into else None
        mode = "auto" if device is NPU else "reference"
        loss = restricted_linear_cross_entropy(h, w, chosen, main_grad=main, kernels=mode)
        loss.sum().backward()
        assert h.grad is not None
        grad = main if into else w.grad
        assert grad is not None
        results.append([loss, h.grad, grad])
    return [far(ours, theirs) for theirs, ours in zip(*results, strict=True)]


def from_logits(dtype: torch.dtype) -> list[list[float]]:
    """The loss from logits and its gradient, for logits that lie in memory in three ways."""
    torch.manual_seed(4)
    wide, scale = torch.randn(N, 2 * VOCAB).to(dtype), torch.linspace(0.5, 1, N)
    cuts: list[Callable[[Any], Any]] = [
        lambda x: x[:, :VOCAB].contiguous(),
        lambda x: x[:, :VOCAB],
        lambda x: x[:, ::2],
    ]
    found = []
    for chosen, cut in [*((sets(), cut) for cut in cuts), (aimed(), cuts[0])]:
        results = []
        for device, mode in (("cpu", "reference"), (NPU, "auto")):
            leaf = cut(wide.to(device)).detach().requires_grad_()
            loss = restricted_cross_entropy(leaf, chosen, kernels=mode)
            (loss * scale.to(device)).sum().backward()
            results.append([loss, leaf.grad])
        found.append([far(ours, theirs) for theirs, ours in zip(*results, strict=True)])
    return found


def empty() -> dict[str, Any]:
    """A shard without candidates, and no positions at all."""
    ops, none = choose(), torch.empty(0, dtype=torch.int32, device=NPU)
    logits, offsets, gold = (x.to(NPU) for x in (torch.randn(2, 5), torch.tensor([0, 0, 0]), torch.tensor([-1, -1])))
    z, stats = ops.restricted_logits_fwd(logits, offsets, none, gold)
    grad = torch.zeros_like(logits)
    ops.restricted_logits_bwd(z, offsets, none, gold, torch.ones(3, 2).to(NPU), grad)
    nothing = ops.restricted_logits_fwd(logits[:0], offsets[:1], none, gold[:0])
    hidden, weight = torch.ones(2, HIDDEN).to(NPU), torch.ones(VOCAB, HIDDEN).to(NPU)
    mixtures = ops.restricted_fwd(hidden, weight, offsets, none, gold, True, torch.ones(0).to(NPU))[2:]
    return {
        "mixtures": [float(mixture.cpu().abs().sum()) for mixture in mixtures],
        "stats": [[float(f"{x:.6g}") for x in row] for row in stats.cpu().tolist()],
        "grad": float(grad.cpu().abs().sum()),
        "no positions": [nothing[0].numel(), list(nothing[1].shape)],
    }


def touched_rows() -> float:
    """The weight's gradient as its touched rows."""
    torch.manual_seed(0)
    chosen = sets().local(VocabShard(0, VOCAB))
    entries = (
        torch.randn(N, HIDDEN),
        *ByColumn.of(chosen.offsets, chosen.columns).entries(torch.randn(chosen.columns.shape[0])),
    )
    wanted = choose("reference").restricted_bwd_rows(*entries)
    found = choose().restricted_bwd_rows(*(x.to(NPU) for x in entries))
    return far(found, wanted)


def selection(dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    logits = torch.randn(6, 50).mul(3).to(dtype)
    logits[1, ::2] = -torch.inf
    logits[2] = 1.0
    logits[3, :48] = -torch.inf
    wanted = choose("reference").topk_rows(logits, 8)
    found = choose().topk_rows(logits.to(NPU), 8)
    strided = choose().topk_rows(logits.to(NPU)[:, 5:40], 8)
    usable = wanted[0] > -torch.inf
    return {
        "values": bool((found[0].cpu() == wanted[0]).all()),
        "columns": bool((found[1].cpu()[usable] == wanted[1][usable]).all()),
        "lse": float((found[2].cpu() - wanted[2]).abs().max()),
        "strided": bool((strided[0].cpu() == choose("reference").topk_rows(logits[:, 5:40], 8)[0]).all()),
        "types": [str(x.dtype) for x in found],
    }


def moclip(dtype: torch.dtype, *, main_weights: bool = False) -> dict[str, Any]:
    """Three steps of MoClip on two tensors, one longer than a chunk."""
    runs = []
    for device in ("cpu", NPU):
        torch.manual_seed(2)
        params = [torch.nn.Parameter(torch.randn(shape).to(dtype).to(device)) for shape in ((70, 130), (11,), (0,))]
        ours = MoClip(
            params, lr=1e-2, clip_grad=1.0, main_weights=main_weights, kernels="auto" if device is NPU else "reference"
        )
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape).to(dtype).to(device)
            ours.step()
        runs.append((params, ours))
    (truth, theirs), (found, ours) = runs
    state = [key for key in ("exp_avg", "exp_avg_sq", "main") if key in ours.state[found[0]]]
    return {
        "params": max(far(a, b) for a, b in zip(found, truth, strict=True)),
        "state": {
            key: max(far(ours.state[a][key], theirs.state[b][key]) for a, b in zip(found[:2], truth[:2], strict=True))
            for key in state
        },
        "metrics": max(
            abs(ours.metrics[key] / theirs.metrics[key] - 1) if theirs.metrics[key] else abs(ours.metrics[key])
            for key in theirs.metrics
        ),
        "norm": abs(ours.grad_norm / theirs.grad_norm - 1),
    }


def refusals() -> dict[str, str]:
    """The binding's errors for arguments it cannot take."""
    h, w = torch.randn(2, HIDDEN, device="cpu"), torch.randn(VOCAB, HIDDEN)
    offsets, columns, gold = torch.tensor([0, 1, 2]), torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0, 1])
    npu = [x.to(NPU) for x in (h, w, offsets, columns, gold)]
    ops = torch.ops.megatron_replay
    call, fwd, bwd = ops.restricted_fwd, ops.restricted_logits_fwd, ops.restricted_logits_bwd
    z, scalars, logits = (x.to(NPU) for x in (torch.zeros(2), torch.ones(3, 2), torch.zeros(2, VOCAB)))
    cases: dict[str, Callable[[], Any]] = {
        "float16": lambda: call(h.half().to(NPU), w.half().to(NPU), *npu[2:], True),
        "one on the cpu": lambda: call(npu[0], npu[1], npu[2], columns, npu[4], True),
        "offsets too short": lambda: call(npu[0], npu[1], offsets[:2].to(NPU), *npu[3:], True),
        "columns int64": lambda: call(*npu[:3], columns.long().to(NPU), npu[4], True),
        "width": lambda: call(h[:, :30].contiguous().to(NPU), w[:, :30].contiguous().to(NPU), *npu[2:], True),
        "logits float64": lambda: torch.ops.megatron_replay.topk_rows(h.double().to(NPU), 4),
        "logits float16": lambda: fwd(logits.half(), *npu[2:]),
        "logits of other positions": lambda: fwd(logits[:1], *npu[2:]),
        "gold on the cpu": lambda: fwd(logits, *npu[2:4], gold),
        "scalars of two": lambda: bwd(z, *npu[2:], scalars[:2], logits),
        "z bfloat16": lambda: bwd(z.bfloat16(), *npu[2:], scalars, logits),
        "targets of another number": lambda: call(*npu, True, z[:1]),
        "targets bfloat16": lambda: fwd(logits, *npu[2:], z.bfloat16()),
        "targets on the cpu": lambda: bwd(z, *npu[2:], scalars, logits, torch.zeros(2, device="cpu")),
        "strided gradient": lambda: bwd(z, *npu[2:], scalars, torch.zeros(VOCAB, 2).to(NPU).t()),
    }
    said = {}
    for name, case in cases.items():
        try:
            case()
            said[name] = "taken"
        except (RuntimeError, ValueError) as err:
            said[name] = str(err).splitlines()[0]
    return said


with HostMath() as seen:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {
        "live": library.live("npu"),
        "loss": {name: loss_and_gradients(dtype) for name, dtype in types.items()},
        "soft": {name: loss_and_gradients(dtype, soft=True) for name, dtype in types.items()},
        "into main_grad": {name: loss_and_gradients(dtype, into=True) for name, dtype in types.items()},
        "from logits": {name: from_logits(dtype) for name, dtype in types.items()},
        "empty": empty(),
        "touched rows": touched_rows(),
        "selection": {name: selection(dtype) for name, dtype in types.items()},
        "moclip": {name: moclip(dtype) for name, dtype in types.items()},
        "main weights": moclip(torch.bfloat16, main_weights=True),
        "refusals": refusals(),
    }
found["places"] = seen.by_device()
print(json.dumps(found))
