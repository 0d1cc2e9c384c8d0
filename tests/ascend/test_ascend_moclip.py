"""moclip_stats and moclip_update on the stand-in: the sums in float64, the bits of plain float32 moments, the
optimizer's own steps."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CHUNK, DTYPES, close, moclip_stats, moclip_update
from stand_in import Library
from torch import Tensor

from megatron_replay.kernels.tensor_updates import Scalars
from megatron_replay.optim import MoClip
from megatron_replay.optim.stats import tensor_sums

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
lengths = pytest.mark.parametrize("length", [1, 7, 64, 2048, 4100, CHUNK, 2 * CHUNK + 2049])
SCALARS = Scalars(0.9, 0.1, 0.2, 0.05, 0.95, 1.5, 1.1, 1e-8, 0.99, 0.01, True)


def vectors(length: int, low: torch.dtype, param: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parameter, gradient, both moments; the first elements of all but the parameter are zero."""
    gen = torch.Generator().manual_seed(length)
    p, g, m, v = (torch.randn(length, generator=gen) for _ in range(4))
    for tensor in (g, m, v):
        tensor[:3] = 0
    g[3:5], m[5:7] = 0, 0
    return p.to(param), g.to(low), m, v.abs()


@dtypes
@lengths
def test_the_sums_are_those_of_float64(kernels: Library, length: int, dtype: torch.dtype) -> None:
    _, g, m, _ = vectors(length, dtype)
    (partial,) = moclip_stats(kernels, g, m)
    found, wanted = partial.double().sum(0)[:3], tensor_sums(g, m)
    assert (
        (found - wanted).abs() <= 2e-7 * torch.stack([(wanted[1] * wanted[2]).sqrt(), wanted[1], wanted[2]]) + 1e-30
    ).all()
    assert not partial[:, 3:].any()
    (alone,) = moclip_stats(kernels, g, None)
    assert not alone[:, :2].any() and torch.equal(alone[:, 2], partial[:, 2])


def plain_update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Scalars) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """parameter float32, moments and direction: each operation rounded once, in the order of `Scalars`."""
    p, g = p.float(), g.float()
    w = g * s.v_grad + m * s.v_momentum
    mean, second = m * s.m_keep + g * s.m_grad, v * s.beta2 + w * w
    root = second.sqrt()
    u = (
        torch.atan2(mean.double() * s.first, root.double()).float()
        if s.arctangent
        else mean / (root * s.second + s.eps) * s.first
    )
    return p * s.keep - u * s.rate, mean, second, u


@dtypes
@pytest.mark.parametrize("param", DTYPES, ids=str)
@pytest.mark.parametrize("arctangent", [True, False])
@lengths
def test_the_update_is_the_formulas(
    kernels: Library, length: int, arctangent: bool, param: torch.dtype, dtype: torch.dtype
) -> None:
    tensors, scalars = vectors(length, dtype, param), SCALARS._replace(arctangent=arctangent)
    rounded = param == torch.float32
    found = moclip_update(kernels, tensors, scalars[:10], arctangent, rounded)
    p, m, v, u = plain_update(*tensors, scalars)
    assert torch.equal(found[1], m) and close(found[2], v, 1e-7)
    torch.testing.assert_close(found[0], p.to(param), rtol=2e-7 if rounded else 2**-8, atol=1e-7 if rounded else 1e-4)
    assert math.isclose(float(found[3].double().sum()), float((u.double() ** 2).sum()), rel_tol=1e-6, abs_tol=1e-12)
    if rounded:
        assert torch.equal(found[4], found[0].to(torch.bfloat16))


def test_the_arctangent_is_exact_to_three_units(kernels: Library) -> None:
    gen = torch.Generator().manual_seed(0)
    m, v = torch.randn(20_000, generator=gen) * 10 ** torch.linspace(-6, 6, 20_000), torch.rand(20_000, generator=gen)
    v[:10], m[10:20], m[20:30], v[25:30] = 0, 0, -0.0, 0
    keep = Scalars(1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, True)
    angle = moclip_update(kernels, [torch.zeros(20_000), torch.zeros(20_000), m, v], keep[:10], True, False)[0]
    exact = torch.atan2(m.double(), v.sqrt().double())
    assert ((angle.double() - exact).abs() <= 3 * 2**-23 * exact.abs().clamp(min=1e-30)).all()


@dtypes
def test_blocks_and_their_order_change_no_bit(kernels: Library, dtype: torch.dtype) -> None:
    tensors = vectors(3 * CHUNK + 300, dtype)
    first = None
    for blocks in (1, 2, 3, 8, 40):
        for backwards in (False, True):
            how = {"blocks": blocks, "backwards": backwards}
            found = (
                *moclip_stats(kernels, tensors[1], tensors[2], **how),
                *moclip_update(kernels, tensors, SCALARS[:10], True, True, **how),
            )
            first = first or found
            assert all(torch.equal(*pair) for pair in zip(found, first, strict=True))


def test_steps_of_the_optimizer(kernels: Library) -> None:
    gen = torch.Generator().manual_seed(9)
    start = torch.randn(3000, generator=gen)
    gradients = [torch.randn(3000, generator=gen) for _ in range(4)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = MoClip([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    p, m, v = start, torch.zeros(3000), torch.zeros(3000)
    for step, g in enumerate(gradients, 1):
        weight.grad = g.clone()
        optimizer.step()
        (partial,) = moclip_stats(kernels, g, m)
        c, mm, gg = partial.double().sum(0)[:3].tolist()
        x = c / math.sqrt(mm * gg) if mm else 1.0
        # max_angle 45: its tangent is 1
        a = min(1.0, abs(x) / math.sqrt(1 - x * x)) if x < math.cos(math.pi / 4) else 1.0
        b = (1 - a) * c / mm if mm else 0.0
        bias = 1 - 0.9**step, 1 - 0.95**step
        scalars = (
            0.9 + 0.1 * b,
            0.1 * a,
            math.sqrt(0.05),
            0.0,
            0.95,
            math.sqrt(bias[1]) / bias[0],
            1.0,
            0.0,
            1 - 0.01 * 0.1,
            0.01,
        )
        p, m, v, _ = moclip_update(kernels, [p, g, m, v], scalars, True, False)
    torch.testing.assert_close(p, weight.detach(), rtol=1e-6, atol=1e-7)


@dtypes
def test_traffic_and_instructions_stay_in_the_budget(kernels: Library, dtype: torch.dtype) -> None:
    n, size = 4 * CHUNK, dtype.itemsize
    tensors = vectors(n, dtype)
    moclip_stats(kernels, tensors[1], tensors[2], blocks=4)
    used = kernels.counters()
    assert used["mte2_bytes"] == n * (size + 4) and used["mte3_bytes"] == 4 * 32
    assert used["repeats"] <= n / 64 * 7.2 and used["v"] <= n / 4096 * 7 + 4 * 4 and used["scalar_waits"] == 0
    moclip_update(kernels, tensors, SCALARS[:10], True, True, blocks=4)
    used = kernels.counters()
    assert used["mte2_bytes"] == n * (size + 12) and used["mte3_bytes"] == n * (12 + 2) + 4 * 32
    assert used["repeats"] <= n / 64 * 56 and used["v"] <= n / 2048 * 54 + 4 * 8 and used["scalar_waits"] == 0
