"""Whole steps: against torch.optim.AdamW, against the method written out naively, and what a step must never do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import BY_SHAPE, Case, further, registered
from torch import Tensor

from megatron_replay.optim import AdamAtan2, AdamW, MoClip, Placement, ReplayOptimizer

Make = Callable[[list[torch.nn.Parameter]], ReplayOptimizer]
ALL = {
    **registered(lr=0.01),
    **further(lr=0.01),
    "adamw-unclipped": Case(name="adamw", lr=0.01, clip_grad=0.0),
    "muon-unclipped": Case(name="muon", lr=0.01, clip_grad=0.0),
    "moclip-project": Case(
        name="moclip", lr=0.01, clip_grad=0.0, options={"scope": "tensor", "obtuse": "project", "v_source": "clipped"}
    ),
    "moclip-restart": Case(
        name="moclip", lr=0.01, clip_grad=0.0, options={"scope": "tensor", "obtuse": "restart", "max_angle": 60}
    ),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
SHAPES = [(7, 5), (130,), (1,), (3, 4, 6)]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in SHAPES]


def gradients(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(s, generator=gen, dtype=torch.float64).to(dtype) for s in SHAPES]


def train(opt: torch.optim.Optimizer, steps: range, scale: float = 1.0) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for seed in steps:
        for p, g in zip(params, gradients(seed), strict=True):
            p.grad = g.to(p.dtype) * scale
        opt.step()


def everything(opt: ReplayOptimizer) -> Iterator[Tensor]:
    for group in opt.param_groups:
        yield torch.tensor(group.get("step"))
        for p in group["params"]:
            yield from (p.detach().clone(), *(v.clone() for _, v in sorted(opt.state.get(p, {}).items())))


def same(left: ReplayOptimizer, right: ReplayOptimizer) -> bool:
    pairs = zip(everything(left), everything(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_atan2_is_the_published_one(dtype: torch.dtype) -> None:
    """With a = b = 1, as the paper's equation 9 has it."""
    from adam_atan2_pytorch import AdamAtan2 as Theirs

    ours, theirs = parameters(dtype), parameters(dtype)
    train(AdamAtan2(ours, 0.01, betas=(0.8, 0.97), weight_decay=0.2), range(12))
    train(Theirs(theirs, 0.01, betas=(0.8, 0.97), weight_decay=0.2, a=1.0, b=1.0), range(12))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_is_torchs(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    train(AdamW(ours, 0.01, betas=(0.8, 0.97), weight_decay=0.2, eps=1e-3), range(12))
    train(torch.optim.AdamW(theirs, 0.01, betas=(0.8, 0.97), weight_decay=0.2, eps=1e-3), range(12))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


class Layered:
    """One process, but the third tensor is of another layer than the rest."""

    def place(self, params: Sequence[Tensor]) -> Placement:
        return Placement(rows=range(4), counted=[True] * 4, layers=[7, 7, -1, 7], kinds=["vector"] * 4)

    def sum(self, table: Tensor) -> Tensor:
        return table


GROUPS = {"global": [[0, 1, 2, 3]], "layer": [[0, 1, 3], [2]], "tensor": [[0], [1], [2], [3]]}


def naive(
    params: list[Tensor], steps: int, *, lr: float, scope: str, obtuse: str, v_source: str, clip: float, degrees: float
) -> None:
    """The method written out for float64 vectors, one group after the other, with no thought of speed."""
    beta1, beta2, decay, limit = 0.9, 0.95, 0.1, math.radians(degrees)
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t in range(1, steps + 1):
        grads = gradients(t - 1, torch.float64)
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads))
        k = min(1, clip / (norm + 1e-6)) if clip else 1
        for group in GROUPS[scope]:
            c = sum(float((m[i] * grads[i]).sum()) for i in group)
            mm = math.sqrt(sum(float((m[i] ** 2).sum()) for i in group))
            gg = math.sqrt(sum(float((grads[i] ** 2).sum()) for i in group))
            phi = math.acos(max(-1, min(1, c / (mm * gg)))) if mm else 0.0
            for i in group:
                along = m[i] * (c / mm**2) if mm else m[i]
                across = grads[i] - along
                g, keep = grads[i], beta1
                if phi > limit and obtuse == "restart" and phi >= math.pi / 2:
                    keep = 0.0
                elif phi > limit and obtuse == "project":
                    reach = gg * max(0, math.cos(phi - limit)) if phi < math.pi / 2 + limit else 0
                    g = reach * (math.cos(limit) * m[i] / mm + math.sin(limit) * across / (gg * math.sin(phi)))
                elif phi > limit:
                    g = along + across * min(1, math.tan(limit) * abs(1 / math.tan(phi)))
                m[i] = keep * m[i] + (1 - beta1) * k * g
                v[i] = beta2 * v[i] + (1 - beta2) * (k * (g if v_source == "clipped" else grads[i])) ** 2
                u = torch.atan2(m[i] / (1 - beta1**t), (v[i] / (1 - beta2**t)).sqrt())
                params[i].mul_(1 - lr * decay).sub_(lr * u)


@pytest.mark.parametrize("scope", GROUPS)
@pytest.mark.parametrize("obtuse", ["signed", "restart", "project"])
@pytest.mark.parametrize("v_source", ["raw", "clipped"])
@pytest.mark.parametrize(("clip", "degrees"), [(0.0, 45.0), (2.0, 20.0), (2.0, 80.0)])
def test_moclip_is_the_method_written_out(scope: str, obtuse: str, v_source: str, clip: float, degrees: float) -> None:
    ours, theirs = parameters(torch.float64), [p.detach().clone() for p in parameters(torch.float64)]
    opt = MoClip(
        ours, 0.05, scope=scope, obtuse=obtuse, v_source=v_source, clip_grad=clip, max_angle=degrees, shards=Layered()
    )
    for seed in range(8):
        for p, g in zip(ours, gradients(seed, torch.float64), strict=True):
            p.grad = g
        opt.step()
    naive(theirs, 8, lr=0.05, scope=scope, obtuse=obtuse, v_source=v_source, clip=clip, degrees=degrees)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-11, atol=1e-11)


@settings(deadline=None, max_examples=15)
@given(
    st.floats(90, 1e6),
    st.sampled_from(["global", "tensor"]),
    st.sampled_from(["signed", "restart", "project"]),
    st.booleans(),
)
def test_wide_angle_is_adam_atan2_bit_for_bit(angle: float, scope: str, obtuse: str, clipped: bool) -> None:
    moclip = MoClip(
        parameters(),
        0.01,
        max_angle=angle,
        scope=scope,
        obtuse=obtuse,
        v_source="clipped" if clipped else "raw",
        clip_grad=3.0,
    )
    atan2 = AdamAtan2(parameters(), 0.01, clip_grad=3.0)
    train(moclip, range(4))
    train(atan2, range(4))
    assert same(moclip, atan2)


@settings(deadline=None, max_examples=10)
@given(st.integers(-20, 20), st.integers(0, 99), st.sampled_from(["global", "layer", "tensor"]))
def test_the_gradients_scale_does_not_matter(power: int, seed: int, scope: str) -> None:
    one, scaled = (MoClip(parameters(seed=seed), 0.01, scope=scope) for _ in range(2))
    train(one, range(4))
    train(scaled, range(4), scale=2.0**power)
    for a, b in zip(one.param_groups[0]["params"], scaled.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


@settings(deadline=None, max_examples=10)
@given(st.floats(1e-6, 10), st.floats(5, 120), st.integers(0, 99), st.sampled_from(["signed", "restart", "project"]))
def test_no_step_is_longer_than_a_quarter_turn(lr: float, angle: float, seed: int, obtuse: str) -> None:
    params = [torch.nn.Parameter(p.detach().double()) for p in parameters(seed=seed)]
    opt = MoClip(params, lr, weight_decay=0.0, max_angle=angle, obtuse=obtuse)
    for step in range(5):
        before = [p.detach().clone() for p in params]
        train(opt, range(step, step + 1), scale=10.0 ** (3 * step))
        assert all(
            float((p.detach() - b).abs().max()) <= lr * math.pi / 2 * (1 + 1e-9) + 1e-14
            for p, b in zip(params, before, strict=True)
        )


@pytest.mark.parametrize(
    "make", [lambda p: MoClip(p, 0.1, weight_decay=0.3), lambda p: AdamAtan2(p, 0.1, weight_decay=0.3)]
)
def test_the_first_step_is_an_eighth_turn_against_the_sign(make: Make) -> None:
    params = parameters(torch.float64)
    before = [p.detach().clone() for p in params]
    train(make(params), range(1))
    for p, b, g in zip(params, before, gradients(0), strict=True):
        torch.testing.assert_close(
            p.detach(), b * (1 - 0.03) - 0.1 * math.pi / 4 * g.sign().double(), rtol=1e-12, atol=1e-12
        )


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(make: Make, poison: float) -> None:
    opt, clean = make(parameters()), make(parameters())
    for stop in (0, 3):  # before the first step, and later
        train(opt, range(stop))
        bad = gradients(77)
        bad[1][100] = poison
        for p, g in zip(opt.param_groups[0]["params"], bad, strict=True):
            p.grad = g
        before = list(everything(opt))
        opt.step()
        assert not opt.last_step_ok and not math.isfinite(opt.grad_norm) and opt.metrics == {}
        assert all(torch.equal(a, b) for a, b in zip(before, everything(opt), strict=True))
        assert all(
            torch.equal(p.grad, g) or g.isnan().any() for p, g in zip(opt.param_groups[0]["params"], bad, strict=True)
        )
        assert stop or all(set(state) <= {"base"} for state in opt.state.values())
    assert opt.skipped == 2
    train(clean, range(3))
    train(opt, range(3, 5))
    train(clean, range(3, 5))
    assert same(opt, clean) and opt.last_step_ok and opt.skipped == 2


@every
def test_gradients_are_read_only(make: Make) -> None:
    params = parameters()
    train(make(params), range(3))
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients(2), strict=True))


@every
def test_parameters_without_gradient_and_empty_groups(make: Make) -> None:
    params = parameters()
    groups = [{"params": params[:2]}, {"params": [], "lr": 1.0}, {"params": params[2:], "weight_decay": 0.0}]
    opt, before = make(groups), [p.detach().clone() for p in params]
    opt.step()
    assert opt.grad_norm == 0 and all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    params[3].grad = gradients(0)[3]
    opt.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[3], before[3])
    keys = set(opt.state_keys)
    assert [p for p, state in opt.state.items() if keys.intersection(state)] == ([params[3]] if keys else [])
    assert opt.grad_norm == pytest.approx(float(gradients(0)[3].norm()))


def test_clipping_scales_the_gradient_of_all_groups_together() -> None:
    clipped, scaled = parameters(torch.float64), parameters(torch.float64)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(0)))
    opt = AdamW([{"params": clipped[:1]}, {"params": clipped[1:]}], 0.01, eps=1.0, clip_grad=0.5)
    train(opt, range(1))
    train(AdamW(scaled, 0.01, eps=1.0), range(1), scale=0.5 / (norm + 1e-6))
    assert opt.grad_norm == pytest.approx(norm)
    for a, b in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_groups_have_their_own_rate_and_decay() -> None:
    params = parameters(torch.float64)
    opt = MoClip([{"params": params[:1], "lr": 0.0}, {"params": params[1:], "weight_decay": 0.0}], 0.1)
    before = [p.detach().clone() for p in params]
    train(opt, range(1))
    assert torch.equal(params[0], before[0])
    torch.testing.assert_close(params[1].detach(), before[1] - 0.1 * math.pi / 4 * gradients(0)[1].sign().double())


def test_bfloat16_is_updated_in_float32_and_rounded() -> None:
    low, high = parameters(torch.bfloat16), parameters(torch.bfloat16)
    opt = MoClip(low, 0.01)
    for p, g in zip(low, gradients(0), strict=True):
        p.grad = g.bfloat16()
    opt.step()
    masters = [torch.nn.Parameter(p.detach().float()) for p in high]
    reference = MoClip(masters, 0.01)
    for p, g in zip(masters, gradients(0), strict=True):
        p.grad = g.bfloat16().float()
    reference.step()
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(low, masters, strict=True))
    assert {v.dtype for p in low for v in opt.state[p].values()} == {torch.float32}


@every
def test_a_transposed_parameter_moves_like_any_other(make: Make) -> None:
    plain, turned = (
        torch.nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(3))) for _ in range(2)
    )
    turned.data = turned.data.t().contiguous().t()
    a, b = make([plain]), make([turned])
    for seed in range(3):
        plain.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed))
        turned.grad = plain.grad.clone()
        a.step()
        b.step()
    assert not turned.is_contiguous() and torch.equal(plain, turned)


ELEMENTWISE = {name: case for name, case in ALL.items() if case.name not in BY_SHAPE and "pull" not in case.options}
"""The optimizers for which a flat view is as good as the matrix.

A pull would want the base weights of the groups assigned.
"""


@pytest.mark.parametrize("make", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_assigned_groups_of_views_without_our_keys(make: Make) -> None:
    """Megatron's wrappers replace the groups by ones whose parameters are views into a flat buffer."""
    whole = parameters()
    flat = torch.cat([p.detach().reshape(-1) for p in whole]).requires_grad_()
    views = list(flat.split([p.numel() for p in whole]))
    ours, reference = make([{"params": []}]), make(whole)
    theirs = {key: reference.defaults[key] for key in ("lr", "weight_decay", "betas") if key in reference.defaults}
    ours.param_groups = [{"params": views, **theirs}]
    for seed in range(3):
        for view, g in zip(views, gradients(seed), strict=True):
            view.grad = g.reshape(-1)
        ours.step()
    train(reference, range(3))
    assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in whole]))


def test_threads_and_blocks_do_not_change_a_bit() -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        gen = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=gen)) for n in (100_003, 65_537, 31)]
        opt = MoClip(params, 0.01, scope="tensor")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen)
            opt.step()
        return params

    threads = torch.get_num_threads()
    try:
        one, three = run(1), run(3)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_the_closure_runs_with_gradients() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    opt = MoClip([param], 0.1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.detach()

    assert float(opt.step(closure)) == 3 and float(param.detach().sum()) < 3


@every
def test_it_learns(make: Make) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(64, 5), torch.nn.Linear(5, 1)
    y, opt = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0], [3.0]]), make(list(layer.parameters()))
    for group in opt.param_groups:
        group["lr"], group["weight_decay"] = 0.05, 0.0
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
