"""Inputs for the kernels, and what comparing a result with its reference asks for.

N positions, H hidden, V vocabulary rows, m candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from stand_in import Library, StandInError
from torch import Tensor

from megatron_replay.ops import torch_kernels as plain

DTYPES = [torch.bfloat16, torch.float32]


@dataclass
class Sets:
    """A restricted-loss problem: hidden [N, H], weight [V, H], offsets [N + 1], columns [m], gold [N]."""

    hidden: Tensor
    weight: Tensor
    offsets: Tensor
    columns: Tensor
    gold: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """positions, width, candidates, vocab: as the launchers take them."""
        return *self.hidden.shape, len(self.columns), self.weight.shape[0]

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets, self.columns, self.gold


def sets(sizes: Sequence[int], vocab: int, width: int, dtype: torch.dtype, *, tied: bool = False, seed: int = 0) -> Sets:
    """Random sets of these sizes; gold at the first, the last or a middle candidate, or on another rank (-1) at every fourth position."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(sizes), width, generator=gen)
    weight = torch.randn(vocab, width, generator=gen) / width**0.5
    if tied:
        weight = weight[:1].expand(vocab, width)
    rows = [torch.randperm(vocab, generator=gen)[:size].sort().values for size in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    places = [(0, size - 1, size // 2, None)[t % 4] for t, size in enumerate(sizes)]
    gold = [-1 if place is None or not size else int(offsets[t]) + place for t, (size, place) in enumerate(zip(sizes, places, strict=True))]
    columns = torch.cat([torch.empty(0, dtype=torch.int64), *rows]).int()
    return Sets(hidden.to(dtype), weight.to(dtype).contiguous(), offsets, columns, torch.tensor(gold, dtype=torch.int64))


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> bool:
    """Equal up to the rounding of sums in another order, relative to the largest number of the tensor."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    scale = float(wanted[wanted.isfinite()].abs().clamp(max=1e30).max()) if wanted.numel() else 1.0
    return torch.allclose(found, wanted, rtol=tolerance, atol=tolerance * max(scale, 1e-30))


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output that nothing was written to yet."""
    return torch.full(shape, 777.0, dtype=dtype)


def restricted_fwd(library: Library, x: Sets, mix: bool = True, **how: object) -> tuple[Tensor, ...]:
    n, width, candidates, _ = x.sizes
    z, stats = untouched(candidates), untouched(3, n)
    mixture = untouched(n, width) if mix else None
    library.call("restricted_fwd", [x.hidden.dtype], x.hidden, x.weight, *x.tables, z, stats, mixture, *x.sizes, **how)  # type: ignore[arg-type]
    return (z, stats, mixture) if mixture is not None else (z, stats)


def restricted_fwd_reference(x: Sets) -> tuple[Tensor, ...]:
    return plain.restricted_fwd(x.hidden, x.weight, *x.tables, True)


@dataclass(frozen=True)
class Scenario:
    """One way to run a kernel, variant or not: what it gives, and what is right."""

    run: Callable[..., tuple[Tensor, ...]]
    wanted: tuple[Tensor, ...]
    tolerance: float = 2e-6
    how: dict[str, object] = field(default_factory=dict)


def outcome(library: Library, variant: str, scenarios: Sequence[Scenario]) -> str:
    """What becomes of a variant: the rule it breaks first, "wrong" where a result is, or "passes"."""
    for scenario in scenarios:
        try:
            found = scenario.run(library, variant=variant, **scenario.how)
        except StandInError as err:
            return str(err)
        if not all(close(f, w, scenario.tolerance) for f, w in zip(found, scenario.wanted, strict=True)):
            return "wrong"
    return "passes"
