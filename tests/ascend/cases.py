"""Inputs for the kernels, and what comparing a result with its reference asks for.

N positions, H hidden, V vocabulary rows, m candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from stand_in import Library, StandInError
from torch import Tensor

from megatron_replay.kernels import torch_twins as plain
from megatron_replay.ops.local_sets import ByColumn

DTYPES = [torch.bfloat16, torch.float32]


@dataclass
class Sets:
    """A restricted-loss problem: hidden [N, H], weight [V, H], offsets [N + 1], columns [m], gold [N], targets [m]."""

    hidden: Tensor
    weight: Tensor
    offsets: Tensor
    columns: Tensor
    gold: Tensor
    targets: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """positions, width, candidates, vocab: as the launchers take them."""
        return *self.hidden.shape, len(self.columns), self.weight.shape[0]

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets, self.columns, self.gold


def sets(
    sizes: Sequence[int],
    vocab: int,
    width: int,
    dtype: torch.dtype,
    *,
    tied: bool = False,
    soft: bool = False,
    seed: int = 0,
) -> Sets:
    """Random sets of these sizes, with random targets where `soft`.

    gold is the first, the last or a middle candidate, or on another rank (-1) at every fourth position.
    """
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sizes), width, generator=gen)
    weight = torch.randn(vocab, width, generator=gen) / width**0.5
    if tied:
        weight = weight[:1].expand(vocab, width)
    rows = [torch.randperm(vocab, generator=gen)[:size].sort().values for size in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    places = [(0, size - 1, size // 2, None)[t % 4] for t, size in enumerate(sizes)]
    gold = [
        -1 if place is None or not size else int(offsets[t]) + place
        for t, (size, place) in enumerate(zip(sizes, places, strict=True))
    ]
    columns = torch.cat([torch.empty(0, dtype=torch.int64), *rows]).int()
    targets = torch.rand(len(columns), generator=gen) if soft else None
    golds = torch.tensor(gold, dtype=torch.int64)
    return Sets(hidden.to(dtype), weight.to(dtype).contiguous(), offsets, columns, golds, targets)


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> bool:
    """Equal up to the rounding of sums in another order, relative to the largest number of the tensor."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    sizes = wanted.abs()[wanted.abs() < 1e30]  # the maximum of no candidates is -3e38
    scale = float(sizes.max()) if sizes.numel() else 0.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * max(scale, 1e-30))


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that nothing was written to yet."""
    return torch.full(shape, 777.0, dtype=dtype)


def restricted_fwd(library: Library, x: Sets, mix: bool = True, **how: object) -> tuple[Tensor, ...]:
    n, width, candidates, _ = x.sizes
    z, stats = untouched(candidates), untouched(3, n)
    mixture = untouched(n, width) if mix else None
    target_mixture = untouched(n, width) if mix and x.targets is not None else None
    given = (x.hidden, x.weight, *x.tables, x.targets)
    results = (z, stats, mixture, target_mixture)
    library.call("restricted_fwd", [x.hidden.dtype], *given, *results, *x.sizes, **how)  # type: ignore[arg-type]
    return tuple(tensor for tensor in results if tensor is not None)


def restricted_fwd_reference(x: Sets) -> tuple[Tensor, ...]:
    results = plain.restricted_fwd(x.hidden, x.weight, *x.tables, True, x.targets)
    return results[:3] if x.targets is None else results


@dataclass(frozen=True)
class Scenario:
    """One way to run a kernel, variant or not: what it gives, and what is right."""

    run: Callable[..., tuple[Tensor, ...]]
    wanted: tuple[Tensor, ...]
    tolerance: float = 2e-6
    how: dict[str, object] = field(default_factory=dict)


def outcome(library: Library, variant: str, scenarios: Sequence[Scenario]) -> str:
    """The outcome of a variant: the rule it breaks first, "wrong" where a result is, or "passes"."""
    for scenario in scenarios:
        try:
            found = scenario.run(library, variant=variant, **scenario.how)
        except StandInError as err:
            return str(err)
        if not all(close(f, w, scenario.tolerance) for f, w in zip(found, scenario.wanted, strict=True)):
            return "wrong"
    return "passes"


def restricted_bwd_dh(
    library: Library, x: Sets, mixture: Tensor, scale: Tensor, target_mixture: Tensor | None = None, **how: object
) -> tuple[Tensor, ...]:
    out = mixture.clone()
    given = (out, x.weight, x.columns, x.gold, scale, target_mixture)
    library.call("restricted_bwd_dh", [x.weight.dtype], *given, *x.sizes, **how)  # type: ignore[arg-type]
    return (out,)


def restricted_bwd_dw(
    library: Library, x: Sets, coefficient: Tensor, grad: Tensor | None, **how: object
) -> tuple[Tensor, ...]:
    """The gradient added to `grad`, or its touched rows."""
    touched, begins, tokens, factors = ByColumn.of(x.offsets, x.columns).entries(coefficient)
    n, width, entries, vocab = x.sizes
    out = untouched(len(touched), width) if grad is None else grad.clone()
    parts = (
        untouched(*library.tiling("parts", entries), width)
        if not how.get("variant")
        else untouched(2 * -(-entries // 64), width)
    )
    elements = [x.hidden.dtype, out.dtype]
    tables = (x.hidden, begins, touched, tokens, factors, out, parts)
    library.call(
        "restricted_bwd_dw", elements, *tables, n, width, len(touched), entries, vocab, grad is not None, **how
    )  # type: ignore[arg-type]
    return (out,)


def logits_fwd(library: Library, logits: Tensor, x: Sets, **how: object) -> tuple[Tensor, ...]:
    """logits [N, stride] of which the first V columns count."""
    n, _, candidates, vocab = x.sizes
    z, stats = untouched(candidates), untouched(3, n)
    library.call(
        "logits_fwd",
        [logits.dtype],
        logits,
        *x.tables,
        x.targets,
        z,
        stats,
        n,
        vocab,
        logits.shape[1],
        candidates,
        **how,
    )  # type: ignore[arg-type]
    return z, stats


def logits_bwd(
    library: Library, z: Tensor, x: Sets, scalars: Tensor, dtype: torch.dtype, **how: object
) -> tuple[Tensor, ...]:
    """scalars [3, N]: peak, factor, grad."""
    n, _, candidates, vocab = x.sizes
    out = torch.zeros(n, vocab, dtype=dtype)
    given = (z, *x.tables, x.targets, *scalars.unbind())
    library.call("logits_bwd", [dtype], *given, out, n, vocab, candidates, **how)  # type: ignore[arg-type]
    return (out,)


CHUNK = 65_536


def moclip_stats(library: Library, grad: Tensor, momentum: Tensor | None, **how: object) -> tuple[Tensor, ...]:
    """[chunks, 8]"""
    partial = untouched(-(-len(grad) // CHUNK), 8)
    library.call("moclip_stats", [grad.dtype], grad, momentum, partial, len(grad), **how)  # type: ignore[arg-type]
    return (partial,)


def moclip_update(
    library: Library,
    tensors: Sequence[Tensor],
    scalars: Sequence[float],
    arctangent: bool,
    rounded: bool,
    **how: object,
) -> tuple[Tensor, ...]:
    """tensors: parameter, gradient, both moments; returns parameter, moments, partial [chunks, 8], and the rounded
    copy."""
    param, grad, m, v = (t.clone() for t in tensors)
    low = untouched(len(param), dtype=torch.bfloat16) if rounded else None
    partial = untouched(-(-len(grad) // CHUNK), 8)
    packed = torch.tensor([*scalars, 0.0])
    packed.view(torch.uint8)[40:] = torch.tensor([int(arctangent), 0, 0, 0], dtype=torch.uint8)
    library.call("moclip_update", [param.dtype, grad.dtype], param, grad, m, v, low, partial, len(param), packed, **how)  # type: ignore[arg-type]
    return (param, m, v, partial, low) if low is not None else (param, m, v, partial)


def topk(library: Library, logits: Tensor, k: int, width: int | None = None, **how: object) -> tuple[Tensor, ...]:
    """The k largest of each row by (value descending, column ascending), merged from the kernel's candidates; and its
    sums [N, 2]."""
    n, stride = logits.shape
    width = stride if width is None else width
    capacity = max(2 * k + 63, 512) // 64 * 64
    values, columns = untouched(n, capacity), torch.full((n, capacity), 777, dtype=torch.int32)
    counts, sums = torch.full((n, 8), 777, dtype=torch.int32), untouched(n, 2)
    library.call("topk", [logits.dtype], logits, values, columns, counts, sums, n, width, stride, k, **how)  # type: ignore[arg-type]
    kept = min(k, width)
    top, ids = torch.full((n, kept), -torch.inf), torch.full((n, kept), -1, dtype=torch.int32)
    for t in range(n):
        held = int(counts[t, 0])
        found = sorted(
            ((-v, c) for v, c in zip(values[t, :held].tolist(), columns[t, :held].tolist(), strict=True) if c >= 0)
        )[:kept]
        top[t, : len(found)] = torch.tensor([-v for v, _ in found])
        ids[t, : len(found)] = torch.tensor([c for _, c in found], dtype=torch.int32)
    return top, ids.float(), sums
