"""The compiled passes against the plain ones, and what must not change a bit: threads, cuts, instruction sets.

The kernel does the reference's operations in their order, each rounded once, so the moments have the same bits.
Directions differ in the last place: torch's float32 square root (MKL's) is not always the nearest number, and the
arctangents are two approximations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from optimizer_cases import BY_MATRIX, Case, further, registered
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.kernels import library, tensor_updates
from megatron_replay.kernels.loading import Mode
from megatron_replay.kernels.schemas import OPERATORS
from megatron_replay.optim import (
    TAM,
    AdamAtan2,
    AdamW,
    MoClip,
    MoFO,
    Muon,
    MuonClip,
    ObservedLogits,
    ReplayOptimizer,
)
from megatron_replay.optim.adam import AdamFamily, kernel_knows
from megatron_replay.optim.stats import sums_of_each, tensor_sums

compiled_only = pytest.mark.usefixtures("compiled")
LR = 0.01
ISAS = ("baseline", "avx2", "avx512")
SHAPES = [(7, 5), (130,), (1,), (0,), (3, 4, 6), (40_001,), (1024,), (33, 31)]
Make = Callable[..., ReplayOptimizer]


def with_arctangent(case: Case) -> bool | None:
    """True where the kernel that updates every tensor of this case takes an arctangent; None without a kernel."""
    if not issubclass(case.kind, AdamFamily) or case.name in BY_MATRIX or not kernel_knows(case.kind):
        return None
    made = case([torch.nn.Parameter(torch.ones(1))])
    assert isinstance(made, AdamFamily)
    correction = made.correction({**made.param_groups[0], "step": 1})
    return None if correction is None else correction.eps is None


CASES = {
    **registered(LR),
    **further(LR),
    "moclip-eps-unclipped": Case(name="moclip", lr=LR, clip_grad=0.0, options={"eps": 1e-8}),
    "tam-unclipped": Case(name="tam", lr=LR, clip_grad=0.0),
}
ROOT = {name: case for name, case in CASES.items() if with_arctangent(case) is False}
ARCTANGENT = {
    **{name: case for name, case in CASES.items() if with_arctangent(case)},
    **{
        f"moclip-{scope}-{obtuse}-{source}": Case(
            name="moclip",
            lr=LR,
            clip_grad=0.0,
            options={"scope": scope, "obtuse": obtuse, "v_source": source, "max_angle": 30.0},
        )
        for scope in ("global", "tensor")
        for obtuse in ("signed", "restart", "project")
        for source in ("raw", "clipped")
    },
}
ALL = {**ROOT, **ARCTANGENT}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
low_and_high = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def tensors(seed: int, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=gen) for s in shapes]


def train(opt: ReplayOptimizer, pick: Callable[[list[Tensor]], list[Tensor]] = list, steps: int = 4) -> ReplayOptimizer:
    params = [p for group in opt.param_groups for p in group["params"]]
    for seed in range(steps):
        for p, g in zip(params, pick(tensors(100 + seed)), strict=True):
            p.grad = g.to(p.dtype)
        opt.step()
    return opt


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t.to(dtype)) for t in tensors(0)]


def held(opt: ReplayOptimizer) -> Iterator[Tensor]:
    """Every parameter and state tensor."""
    for group in opt.param_groups:
        for p in group["params"]:
            yield from (p.detach(), *(v for _, v in sorted(opt.state[p].items())))


def same(left: ReplayOptimizer, right: ReplayOptimizer) -> bool:
    return all(torch.equal(a, b) for a, b in zip(held(left), held(right), strict=True))


@compiled_only
@pytest.mark.parametrize("main", [False, True])
@low_and_high
@pytest.mark.parametrize("make", ROOT.values(), ids=ROOT.keys())
def test_without_an_arctangent_the_weights_agree_to_a_roots_error(make: Make, dtype: torch.dtype, main: bool) -> None:
    fused = train(make(parameters(dtype), main_weights=main))
    plain = train(make(parameters(dtype), main_weights=main, kernels="reference"))
    for a, b in zip(held(fused), held(plain), strict=True):
        # 4 steps of lr times a few ulp of a direction below 4; and bfloat16 may round the other way
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-2, atol=4 * LR * 2.4e-7 * 4)
    assert fused.metrics == pytest.approx(plain.metrics, rel=1e-6) and fused.grad_norm == pytest.approx(
        plain.grad_norm, rel=1e-12
    )


@compiled_only
@pytest.mark.parametrize("main", [False, True])
@low_and_high
@pytest.mark.parametrize("make", ARCTANGENT.values(), ids=ARCTANGENT.keys())
def test_with_an_arctangent_the_weights_agree_to_its_error(make: Make, dtype: torch.dtype, main: bool) -> None:
    fused = train(make(parameters(dtype), main_weights=main))
    plain = train(make(parameters(dtype), main_weights=main, kernels="reference"))
    for a, b in zip(held(fused), held(plain), strict=True):
        # 4 steps, each lr times 2 ulp of an angle below 2; and bfloat16 may round the other way
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 1e-2, atol=4 * LR * 2.4e-7 * 2)
    assert fused.metrics == pytest.approx(plain.metrics, rel=1e-5)


@compiled_only
def test_the_moments_have_the_references_bits() -> None:
    fused, plain = (train(AdamAtan2(parameters(), LR, kernels=mode)) for mode in ("auto", "reference"))
    for p, q in zip(fused.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert all(torch.equal(fused.state[p][key], plain.state[q][key]) for key in ("exp_avg", "exp_avg_sq"))


@compiled_only
def test_float64_is_the_references() -> None:
    fused, plain = (train(MoClip(parameters(torch.float64), LR, kernels=mode)) for mode in ("auto", "reference"))
    for a, b in zip(held(fused), held(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_momentum", [False, True])
def test_sums(dtype: torch.dtype, with_momentum: bool) -> None:
    grads = [t.to(dtype) for t in tensors(1)]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    momenta = [t.to(state) if with_momentum and i != 1 else None for i, t in enumerate(tensors(2))]
    found = sums_of_each(grads, momenta, mode="auto")
    wanted = torch.stack([tensor_sums(g, m) for g, m in zip(grads, momenta, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-11)


@compiled_only
def test_sums_of_what_is_not_finite() -> None:
    for bad in (math.inf, math.nan):
        grad = torch.ones(300)
        grad[299] = bad
        assert not sums_of_each([grad], [None], mode="auto")[0, 2].isfinite()


@every
@low_and_high
def test_instruction_sets_and_threads_give_the_same_bits(
    make: Make, dtype: torch.dtype, with_isa: Callable[[str], bool], with_threads: Callable[[int], None]
) -> None:
    runs = []
    for isa in ISAS:
        for threads in (1, 3):
            with_threads(threads)
            if with_isa(isa):
                runs.append(train(make(parameters(dtype), main_weights=True), steps=3))
    assert runs and all(same(runs[0], other) for other in runs[1:])
    assert len({run.grad_norm for run in runs}) == 1 and all(run.metrics == runs[0].metrics for run in runs)


@compiled_only
@low_and_high
@pytest.mark.parametrize("make", [ROOT["adamw"], ARCTANGENT["adam_atan2"], ARCTANGENT["moclip-global-project-clipped"]])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (13, 64, 65, 1023), (1, 40_000), (32_767, 32_769), (17, 33_333)])
def test_a_shard_cut_anywhere_has_the_bits_of_the_whole(make: Make, dtype: torch.dtype, cuts: tuple[int, ...]) -> None:
    whole = make([torch.nn.Parameter(tensors(0)[5].to(dtype))], main_weights=True)
    train(whole, lambda grads: [grads[5]])
    edges = [0, *cuts, 40_001]
    spans = [slice(a, b) for a, b in pairwise(edges)]
    parts = make([torch.nn.Parameter(tensors(0)[5][span].to(dtype)) for span in spans], main_weights=True)
    train(parts, lambda grads: [grads[5][span] for span in spans])
    (param,) = whole.param_groups[0]["params"]
    assert torch.equal(torch.cat(parts.param_groups[0]["params"]), param)


@compiled_only
@low_and_high
@pytest.mark.parametrize("main", [False, True])
def test_tensors_that_are_not_contiguous(dtype: torch.dtype, main: bool) -> None:
    plain, turned = (torch.nn.Parameter(tensors(3, [(61, 90)])[0].to(dtype)) for _ in range(2))
    turned.data = turned.data.t().contiguous().t()
    a, b = (MoClip([p], LR, main_weights=main) for p in (plain, turned))
    for seed in range(3):
        plain.grad = tensors(seed, [(61, 90)])[0].to(dtype)
        turned.grad = plain.grad.t().contiguous().t()
        a.step()
        b.step()
    assert not turned.is_contiguous() and torch.equal(plain, turned)


@compiled_only
def test_autograd_notices_the_update() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    loss = (param * param).sum()
    param.grad = torch.ones(4)
    AdamW([param], LR).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@compiled_only
def test_a_class_with_a_rule_of_its_own_is_moved_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    class Signs(AdamW):
        def direction(self, exp_avg, exp_avg_sq, scratch, group):  # type: ignore[no-untyped-def]
            return torch.sign(exp_avg, out=scratch[0][: exp_avg.numel()])

    calls: list[int] = []
    fused = tensor_updates.update
    monkeypatch.setattr(tensor_updates, "update", lambda updates: calls.append(len(updates)) or fused(updates))

    class Masked(AdamW):
        def filter(self, direction, exp_avg, grad, row):  # type: ignore[no-untyped-def]
            direction.mul_(direction * grad > 0)

    for make in (MoFO, Signs, Masked):
        train(make(parameters(), LR), steps=1)
    assert not calls
    params = parameters()
    train(Signs(params, 1.0, weight_decay=0.0), steps=1)
    assert torch.equal(params[1].detach(), tensors(0)[1] - tensors(100)[1].sign())
    train(AdamW(parameters(), LR), steps=1)
    train(AdamW(parameters(), LR, kernels="reference"), steps=1)
    assert calls == [len(SHAPES)]


def test_modes_are_checked_and_told() -> None:
    with pytest.raises(ConfigError, match="unknown kernels 'referense'; did you mean 'reference'"):
        AdamW(parameters(), LR, kernels="referense")  # type: ignore[arg-type]
    assert set(library.live("cpu", "reference").values()) == {"reference"} == set(library.live("npu").values())
    assert library.live() == dict.fromkeys(OPERATORS, "compiled" if library.EXTENSION == "loaded" else "reference")


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_main_weights_keep_what_bfloat16_loses(mode: Mode) -> None:
    low, high = parameters(torch.bfloat16), [torch.nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    ours, theirs = MoClip(low, 1e-4, main_weights=True, kernels=mode), MoClip(high, 1e-4, kernels=mode)
    train(ours, lambda grads: [g.bfloat16() for g in grads], steps=6)
    train(theirs, lambda grads: [g.bfloat16() for g in grads], steps=6)
    for p, q in zip(low, high, strict=True):
        assert torch.equal(ours.state[p]["main"], q) and torch.equal(p, q.bfloat16())


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_main_weights_survive_a_checkpoint(mode: Mode) -> None:
    straight = train(MoClip(parameters(torch.bfloat16), LR, main_weights=True, kernels=mode), steps=4)
    first = train(MoClip(parameters(torch.bfloat16), LR, main_weights=True, kernels=mode), steps=2)
    again = [torch.nn.Parameter(p.detach().clone()) for p in first.param_groups[0]["params"]]
    second = MoClip(again, LR, main_weights=True, kernels=mode)
    second.load_state_dict(first.state_dict())
    for seed in (2, 3):
        for p, g in zip(again, tensors(100 + seed), strict=True):
            p.grad = g.bfloat16()
        second.step()
    assert same(straight, second)
    without = MoClip(again, LR)
    without.load_state_dict(second.state_dict())
    assert all("main" not in without.state[p] for p in again)


def test_every_way_of_moving_acts_on_the_main_weights() -> None:
    """The pull, Muon's step and QK-Clip's factor: float32 parameters that see the same gradients go the same way."""
    shapes = [(8, 6), (8, 6)]
    makes: list[Make] = [
        partial(AdamW, lr=LR, pull=3.0, pull_k=0.5, pull_t0=2.0),
        partial(Muon, lr=LR, ns_precision="float32"),
    ]
    starts = [t.bfloat16() for t in tensors(5, shapes)]

    def run(make: Make, start: list[Tensor]) -> ReplayOptimizer:
        opt = make([torch.nn.Parameter(t.clone()) for t in start], main_weights=True)
        for seed in range(3):
            for p, g in zip(opt.param_groups[0]["params"], tensors(seed, shapes), strict=True):
                p.grad = g.bfloat16().to(p.dtype)
            opt.step()
        return opt

    def clipped(params: list[torch.nn.Parameter], **others: bool) -> ReplayOptimizer:
        logits = ObservedLogits([(params[0], params[1])], 2)
        logits.observe(0, torch.tensor([150.0, 120.0]))
        return MuonClip(params, LR, logits=logits, ns_precision="float32", **others)

    for make in (*makes, clipped):
        low, high = run(make, starts), run(make, [t.float() for t in starts])
        for p, q in zip(low.param_groups[0]["params"], high.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(low.state[p]["main"], q.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(p, low.state[p]["main"].bfloat16())


@compiled_only
def test_the_operators_keep_torchs_rules() -> None:
    def inputs(low: bool) -> tuple[list[Tensor], ...]:
        p, g, m = ([t.clone() for t in tensors(seed, [(5,), (3, 4)])] for seed in (0, 1, 2))
        return p, g, m, [t.square() for t in m], [t.bfloat16() for t in p] if low else []

    scalars = torch.tensor(
        [[0.9, 0.1, 0.2, 0.0, 0.95, 1.0, 1.0, 1e-8, 0.999, 1e-3, kind] for kind in (0, 1)], dtype=torch.float64
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    _, g, m, *_ = inputs(False)
    torch.library.opcheck(torch.ops.megatron_replay.optimizer_sums.default, (g, [m[0], None]), test_utils=checks)
    for low in (False, True):
        torch.library.opcheck(torch.ops.megatron_replay.adam_update.default, (*inputs(low), scalars), test_utils=checks)


@compiled_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g, m, v: (p, [x.double() for x in g], m, v), "float32 or bfloat16"),
        (lambda p, g, m, v: (p, [x[:-1] for x in g], m, v), "of one size"),
        (lambda p, g, m, v: (p, g, [x.bfloat16() for x in m], v), "exp_avg must be contiguous float32"),
        (lambda p, g, m, v: (p, g, m[:0], v), "different lengths"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Callable[..., tuple[list[Tensor], ...]], message: str) -> None:
    lists = change(*([torch.ones(4)] for _ in range(4)))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megatron_replay.adam_update(*lists, [], torch.ones(1, 11, dtype=torch.float64))


def test_the_kernel_knows_exactly_the_rules_it_has() -> None:
    known = {kind.__name__ for kind in (AdamW, AdamAtan2, MoClip, MoFO, TAM, AdamFamily) if kernel_knows(kind)}
    assert known == {"AdamFamily", "AdamW", "AdamAtan2", "MoClip", "TAM"}
