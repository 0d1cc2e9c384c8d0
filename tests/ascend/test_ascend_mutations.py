"""Every broken variant of every kernel is stopped: by the rule it breaks, or because its result is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from cases import (
    CHUNK,
    Scenario,
    logits_bwd,
    logits_fwd,
    moclip_stats,
    moclip_update,
    outcome,
    restricted_bwd_dh,
    restricted_bwd_dw,
    restricted_fwd,
    restricted_fwd_reference,
    sets,
    topk,
)
from mutations import ALL
from stand_in import Library, build_variants

pytestmark = pytest.mark.slow
LOW = torch.bfloat16


def correct(library: Library, run: Callable[..., tuple[torch.Tensor, ...]], **how: object) -> Scenario:
    """The results of the unbroken kernel, which the other tests compare with plain torch."""
    return Scenario(run, run(library, **how), 1e-6, how)


def scenarios_of(kernel: str, library: Library) -> list[Scenario]:
    gen = torch.Generator().manual_seed(5)
    if kernel == "restricted_fwd":
        problems = [
            sets([1, 2, 0, 15, 16, 0, 200, 31, 3], 300, 64, LOW),
            sets([5, 3], 40, 8192, LOW),
            sets([30, 2, 5], 64, 1040, LOW),
        ]
        problems[2].hidden *= 60
        problems.append(sets([3] * 300, 40, 16, LOW))
        problems += [sets([1, 2, 0, 15, 16, 0, 40, 31], 300, 64, LOW, soft=True), sets([5, 3], 9, 8192, LOW, soft=True)]
        return [Scenario(partial(restricted_fwd, x=x), restricted_fwd_reference(x)) for x in problems]
    if kernel == "restricted_bwd_dh":
        found = []
        for width, sizes in ((64, [3, 9, 1, 40, 0, 7]), (8192, [5, 4]), (5120, [6])):
            x = sets(sizes, 60, width, LOW)
            mixture, scale = torch.randn(len(sizes), width, generator=gen), torch.rand(2, len(sizes), generator=gen)
            run = partial(restricted_bwd_dh, x=x, mixture=mixture, scale=scale)
            found += [
                correct(library, run),
                correct(library, partial(run, target_mixture=mixture.flip(0).contiguous())),
            ]
        return found
    if kernel == "restricted_bwd_dw":
        found = []
        for sizes, vocab, width in (
            ([3, 9, 1, 40, 0, 7], 60, 64),
            ([3] * 130, 3, 32),
            ([2] * 64, 2, 16),
            ([9, 8], 20, 8192),
        ):
            x = sets(sizes, vocab, width, LOW)
            coefficient, grad = torch.randn(len(x.columns), generator=gen), torch.randn(vocab, width, generator=gen)
            found.append(correct(library, partial(restricted_bwd_dw, x=x, coefficient=coefficient, grad=grad)))
        return found
    if kernel in ("logits_fwd", "logits_bwd"):
        x = sets([1, 2, 0, 70, 200, 64, 3, 31], 300, 16, LOW)
        logits = (torch.randn(8, 307, generator=gen) * 20).to(LOW)
        z, stats = logits_fwd(library, logits, x)
        scalars = torch.stack([stats[0], torch.rand(8, generator=gen), torch.rand(8, generator=gen)])
        both = (x, replace(x, targets=torch.rand(len(x.columns), generator=gen)))
        if kernel == "logits_fwd":
            return [correct(library, partial(logits_fwd, logits=logits, x=some)) for some in both]
        return [correct(library, partial(logits_bwd, z=z, x=some, scalars=scalars, dtype=LOW)) for some in both]
    if kernel == "moclip_stats":
        lengths = (100, 3 * CHUNK + 5000)
        vectors = [(torch.randn(n, generator=gen).to(LOW), torch.randn(n, generator=gen)) for n in lengths]
        return [correct(library, partial(moclip_stats, grad=g, momentum=m)) for g, m in vectors]
    if kernel == "moclip_update":
        found = []
        for n in (100, CHUNK + 3000):
            tensors = [
                torch.randn(n, generator=gen),
                torch.randn(n, generator=gen).to(LOW),
                torch.randn(n, generator=gen),
                torch.rand(n),
            ]
            for tensor in tensors[1:]:
                tensor[:5] = 0
            scalars = (0.9, 0.1, 0.2, 0.05, 0.95, 1.5, 1.1, 1e-8, 0.99, 0.01)
            found.append(
                correct(
                    library, partial(moclip_update, tensors=tensors, scalars=scalars, arctangent=True, rounded=True)
                )
            )
        return found
    short, long = torch.randn(3, 100, generator=gen) * 50, torch.randn(4, 9000, generator=gen)
    tied = torch.randn(3, 2100, generator=gen).round()
    return [correct(library, partial(topk, logits=x.to(LOW), k=k)) for x, k in ((short, 7), (long, 200), (tied, 200))]


@pytest.fixture(scope="module")
def of_kernel(
    kernels: Library, build_folder: Path, stand_in_core: list[Path]
) -> Callable[[str], tuple[Library, list[Scenario]]]:
    """`of_kernel("topk")`: the library of its variants, and how to run them."""

    @cache
    def make(kernel: str) -> tuple[Library, list[Scenario]]:
        return Library(build_variants(build_folder, stand_in_core, kernel, ALL[kernel])), scenarios_of(kernel, kernels)

    return make


def test_every_kernel_has_a_table() -> None:
    assert all(len(table) >= 12 for table in ALL.values())


@pytest.mark.parametrize("kernel", ALL)
def test_the_unbroken_kernel_passes(
    kernels: Library, of_kernel: Callable[[str], tuple[Library, list[Scenario]]], kernel: str
) -> None:
    assert outcome(kernels, "call", of_kernel(kernel)[1]) == "passes"


@pytest.mark.parametrize(
    ("kernel", "index"),
    [pytest.param(k, i, id=f"{k}: {mutation.name}") for k, table in ALL.items() for i, mutation in enumerate(table)],
)
def test_a_broken_variant_is_stopped(
    of_kernel: Callable[[str], tuple[Library, list[Scenario]]], kernel: str, index: int
) -> None:
    library, scenarios = of_kernel(kernel)
    assert ALL[kernel][index].says in outcome(library, f"v{index}", scenarios)
