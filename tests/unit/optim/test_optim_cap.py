"""The cap of MoClip: closed-form cases in the plane, and what must hold for any momentum and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.optim import MoClip
from megatron_replay.optim.moclip import coefficients

ROOT3 = math.sqrt(3)
CASES = [  # momentum (2, 0): angle, rule, gradient, capped gradient
    (45, "signed", (1, 2), (1, 1)),
    (45, "project", (1, 2), (1.5, 1.5)),
    (45, "restart", (1, 2), (1, 1)),
    (45, "signed", (1, -3), (1, -1)),
    (45, "signed", (2, 1), (2, 1)),
    (45, "project", (2, 1), (2, 1)),
    (45, "restart", (2, 1), (2, 1)),
    (45, "signed", (-1, 2), (-1, 1)),
    (45, "signed", (0, 5), (0, 0)),
    (45, "project", (0, 5), (2.5, 2.5)),
    (45, "project", (-3, 0), (0, 0)),
    (45, "project", (-2, 1), (0, 0)),
    (45, "signed", (-3, 0), (-3, 0)),
    (45, "signed", (4, 0), (4, 0)),
    (45, "signed", (0, 0), (0, 0)),
    (30, "signed", (3, 4), (3, ROOT3)),
    (60, "signed", (1, 3), (1, ROOT3)),
    (90, "signed", (-1, 3), (-1, 3)),
    (180, "restart", (-1, 3), (-1, 3)),
]


def sums(m: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (m @ g).reshape(1), (m @ m).reshape(1), (g @ g).reshape(1)


def capped(m: Tensor, g: Tensor, max_angle: float, obtuse: str) -> Tensor:
    cap = coefficients(*sums(m, g), max_angle=max_angle, obtuse=obtuse)
    return cap.a * g + cap.b * m


def stepped(grad: tuple[float, ...], **options: object) -> MoClip:
    """A MoClip whose momentum was (2, 0) and that has taken one step with this gradient."""
    param = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = MoClip([param], 0.1, betas=(0.75, 0.5), weight_decay=0.0, **options)
    opt.init_state()
    opt.state[param]["exp_avg"].copy_(torch.tensor([2.0, 0.0]))
    opt.param_groups[0]["step"] = 1
    param.grad = torch.tensor(grad, dtype=torch.float64)
    opt.step()
    return opt


def state(opt: MoClip, key: str) -> Tensor:
    return opt.state[opt.param_groups[0]["params"][0]][key]


@pytest.mark.parametrize(("angle", "obtuse", "grad", "expected"), CASES)
def test_closed_forms(angle: float, obtuse: str, grad: tuple[float, ...], expected: tuple[float, ...]) -> None:
    m, g, want = (torch.tensor(v, dtype=torch.float64) for v in ((2.0, 0.0), grad, expected))
    torch.testing.assert_close(capped(m, g, angle, obtuse), want, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize(("angle", "obtuse", "grad", "expected"), CASES)
def test_closed_forms_through_a_step(
    angle: float, obtuse: str, grad: tuple[float, ...], expected: tuple[float, ...], scope: str
) -> None:
    opt = stepped(grad, max_angle=angle, obtuse=obtuse, scope=scope)
    want = 0.75 * torch.tensor([2.0, 0.0]) + 0.25 * torch.tensor(expected)
    torch.testing.assert_close(state(opt, "exp_avg"), want.double(), rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(state(opt, "exp_avg_sq"), 0.5 * torch.tensor(grad, dtype=torch.float64).square())


@pytest.mark.parametrize("grad", [(-1.0, 2.0), (0.0, 5.0), (-3.0, 0.0)])
def test_restart_drops_the_momentum_of_an_obtuse_gradient(grad: tuple[float, ...]) -> None:
    opt = stepped(grad, obtuse="restart")
    torch.testing.assert_close(state(opt, "exp_avg"), 0.25 * torch.tensor(grad, dtype=torch.float64))
    assert opt.metrics["moclip/clipped"] == 1


def test_second_moment_of_the_capped_gradient() -> None:
    torch.testing.assert_close(
        state(stepped((1.0, 2.0), v_source="clipped"), "exp_avg_sq"),
        torch.tensor([0.5, 0.5], dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


def test_metrics_of_a_capped_step() -> None:
    metrics = stepped((-1.0, 2.0)).metrics
    angle = 180 - math.degrees(math.atan(2))
    assert metrics == pytest.approx(
        {
            "moclip/angle_mean": angle,
            "moclip/angle_p95": angle,
            "moclip/clipped": 1,
            "moclip/obtuse": 1,
            "moclip/grad_ratio": math.sqrt(2 / 5),
        }
    )


vectors = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        *[
            st.lists(st.floats(-1e3, 1e3, width=32), min_size=n, max_size=n).map(
                lambda v: torch.tensor(v, dtype=torch.float64)
            )
        ]
        * 2
    )
)
angles = st.floats(1.0, 89.0)


def usable(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    assume(all(float(v.norm()) > 1e-3 for v in pair))
    return pair


def degrees(m: Tensor, g: Tensor) -> float:
    """The angle by the arctangent, which is exact near 0 and 180 where the arccosine is not."""
    m, g = m / m.norm(), g / g.norm()
    return math.degrees(2 * math.atan2(float((m - g).norm()), float((m + g).norm())))


@settings(deadline=None, max_examples=50)
@given(vectors, angles)
def test_acute_gradients_end_within_the_angle(pair: tuple[Tensor, Tensor], max_angle: float) -> None:
    m, g = usable(pair)
    assume(degrees(m, g) < 89.99)
    for obtuse in ("signed", "restart", "project"):
        turned = capped(m, g, max_angle, obtuse)
        assert degrees(m, turned) <= max_angle + 1e-5


@settings(deadline=None, max_examples=50)
@given(vectors, angles, st.sampled_from(["signed", "restart", "project"]))
def test_never_longer_and_never_against_the_gradient(
    pair: tuple[Tensor, Tensor], max_angle: float, obtuse: str
) -> None:
    m, g = usable(pair)
    turned = capped(m, g, max_angle, obtuse)
    assert float(turned.norm()) <= float(g.norm()) * (1 + 1e-12)
    assert float(turned @ g) >= -1e-12 * float(g @ g)


@settings(deadline=None, max_examples=50)
@given(vectors, angles)
def test_project_is_the_nearest_point_of_the_cone(pair: tuple[Tensor, Tensor], max_angle: float) -> None:
    m, g = usable(pair)
    point = capped(m, g, max_angle, "project")
    assume(degrees(m, g) > max_angle + 1e-6)
    axis = m / m.norm()
    for seed in range(20):
        away = torch.randn(len(m), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        away = away - (away @ axis) * axis
        inside = axis + away / away.norm() * math.tan(math.radians(max_angle))
        inside = inside * ((inside @ g).clamp(min=0) / (inside @ inside))  # the best multiple of this edge of the cone
        assert float((point - g).norm()) <= float((inside - g).norm()) + 1e-9 * float(g.norm())


def test_sums_too_large_to_multiply() -> None:
    """sqrt(M) sqrt(G), not sqrt(M G): the product overflows here."""
    big = torch.tensor([1e200], dtype=torch.float64)
    cap = coefficients(0.8 * big, big, big, max_angle=30)
    assert cap.cosine.item() == pytest.approx(0.8) and cap.a.item() == pytest.approx(0.8 / 0.6 / ROOT3)


def test_zero_momentum_or_gradient_is_left_alone() -> None:
    c, mm, gg = (torch.tensor(v, dtype=torch.float64) for v in ([0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]))
    for obtuse in ("signed", "restart", "project"):
        cap = coefficients(c, mm, gg, max_angle=45, obtuse=obtuse)
        assert (
            cap.a.tolist() == [1, 1, 1]
            and cap.b.tolist() == [0, 0, 0]
            and not cap.restart.any()
            and cap.cosine.isnan().all()
        )
