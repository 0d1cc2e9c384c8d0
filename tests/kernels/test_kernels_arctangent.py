"""The kernel's arctangent against float64.

It is seen through an update that leaves nothing but the direction: theta 0, lr 1, m = g, v = w^2.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_replay.kernels.tensor_updates import Scalars

pytestmark = pytest.mark.usefixtures("compiled")
INF, NAN = math.inf, math.nan
TINY = 1.4e-45


def atan2(y: Tensor, x: Tensor) -> Tensor:
    """The kernel's angle of (y, x), both float32 [n]; x is the root of a float32 second moment."""
    theta, m, v = torch.zeros_like(y), y.clone(), x.square()
    scalars = Scalars(1, 0, 0, 0, 1, first=1, second=1, eps=0, keep=0, rate=-1, arctangent=True)
    table = torch.tensor([scalars], dtype=torch.float64)
    torch.ops.megatron_replay.adam_update([theta], [torch.zeros_like(y)], [m], [v], [], table)
    return theta


def ulps(found: Tensor, y: Tensor, x: Tensor) -> float:
    """Largest distance from the float64 angle, in units in the last place of its float32 value."""
    exact = torch.atan2(y.double(), x.square().sqrt().double())
    unit = torch.nextafter(exact.float().abs(), torch.tensor(INF)) - exact.float().abs()
    return float(((found.double() - exact).abs() / unit.double()).max())


def test_the_stated_error_holds_on_a_dense_sample() -> None:
    gen = torch.Generator().manual_seed(0)
    for scale in (1.0, 1e-3, 1e3):
        t = torch.cat([torch.linspace(0, 4, 1_000_001), torch.rand(500_000, generator=gen)])
        x = (torch.rand(len(t), generator=gen) + 0.5) * scale
        y = t * x
        assert ulps(atan2(y, x), y, x) < 2


def test_huge_and_tiny_ratios() -> None:
    exponent = torch.arange(-120, 120, dtype=torch.float64)
    y = (1.7 * 2.0**exponent).float()
    x = torch.full_like(y, 1.3)
    assert ulps(atan2(y, x), y, x) < 2
    small = torch.tensor([TINY, 3e-45, 1e-40, 1.1e-38, 1.2e-38])
    one = torch.ones(5)
    assert torch.equal(atan2(small, one), small), "a denormal angle is the ratio itself"


def test_the_sign_of_the_momentum_is_the_sign_of_the_angle_exactly() -> None:
    gen = torch.Generator().manual_seed(1)
    y, x = torch.randn(4099, generator=gen), torch.rand(4099, generator=gen)
    assert torch.equal(atan2(-y, x), -atan2(y, x))


@pytest.mark.parametrize(
    ("y", "x", "angle"),
    [
        (0.0, 0.0, 0.0),
        (-0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0),
        (1.0, 0.0, math.pi / 2),
        (-1.0, 0.0, -math.pi / 2),
        (TINY, 0.0, math.pi / 2),
        (2.5, 2.5, math.pi / 4),
        (-2.5, 2.5, -math.pi / 4),
        (1.0, INF, 0.0),
        (NAN, 1.0, NAN),
        (1.0, NAN, NAN),
        (INF, INF, NAN),
    ],
)
def test_special_values(y: float, x: float, angle: float) -> None:
    for length in (1, 7, 16, 65):  # scalar remainders and whole vectors
        found = atan2(torch.full((length,), y), torch.full((length,), x))
        assert torch.equal(found, torch.full((length,), angle)) or (math.isnan(angle) and bool(found.isnan().all()))
