"""State: exact resumption, exchange between optimizers, and the options refused at construction."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from optimizer_cases import Case, registered

from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.optim import AdamAtan2, AdamW, MoClip, build_optimizer

ALL = registered(lr=0.01)
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    gen = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(s, generator=gen).to(dtype)) for s in ((11, 3), (40,))]


def train(opt: torch.optim.Optimizer, steps: range) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for seed in steps:
        gen = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p.dtype)
        opt.step()


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every
def test_resuming_is_exact(make: Case, dtype: torch.dtype) -> None:
    straight, halted = parameters(dtype), parameters(dtype)
    whole, first = make(straight), make(halted)
    train(whole, range(8))
    train(first, range(4))
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in halted]
    second = dataclasses.replace(make, lr=0.5)(fresh)
    second.load_state_dict(saved(first.state_dict()))
    train(second, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(straight, fresh, strict=True))
    for a, b in zip(straight, fresh, strict=True):
        assert all(
            torch.equal(whole.state[a][k], v) and v.dtype == whole.state[a][k].dtype for k, v in second.state[b].items()
        )
    assert second.param_groups[0]["step"] == 8 and second.param_groups[0]["lr"] == make.lr


def test_adamw_and_moclip_exchange_state() -> None:
    """Loading AdamW's state into MoClip and back continues AdamW's run as if nothing had been."""
    straight, travelled = parameters(), parameters()
    whole, first = AdamW(straight, 0.01), AdamW(travelled, 0.01)
    train(whole, range(6))
    train(first, range(3))
    middle = MoClip(travelled, 0.01)
    middle.load_state_dict(saved(first.state_dict()))
    back = AdamW(travelled, 0.01)
    back.load_state_dict(saved(middle.state_dict()))
    train(back, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, travelled, strict=True))
    train(middle, range(6, 7))
    assert middle.param_groups[0]["step"] == 4 and "moclip/angle_mean" in middle.metrics


def test_moclip_goes_on_from_adamw_with_its_own_step() -> None:
    """AdamW's epsilon comes along in the groups and must not turn the arctangent into a quotient."""
    before = parameters()
    first = AdamW(before, 0.01)
    train(first, range(3))
    ends = []
    for make in (lambda p: MoClip(p, 0.01, max_angle=90.0), lambda p: AdamAtan2(p, 0.01)):
        after = [torch.nn.Parameter(p.detach().clone()) for p in before]
        opt = make(after)
        opt.load_state_dict(saved(first.state_dict()))
        train(opt, range(3, 5))
        ends.append(after)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_torchs_adamw_state_is_taken_over() -> None:
    theirs, ours = parameters(), parameters()
    torchs = torch.optim.AdamW(theirs, 0.01, betas=(0.9, 0.95), weight_decay=0.1)
    train(torchs, range(3))
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
    opt = AdamW(ours, 0.5)
    opt.load_state_dict(saved(torchs.state_dict()))
    assert opt.param_groups[0]["step"] == 3 and set(opt.state[ours[0]]) == {"exp_avg", "exp_avg_sq"}
    train(torchs, range(3, 6))
    train(opt, range(3, 6))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_uneven_step_counts_are_refused() -> None:
    state = saved(torch.optim.AdamW(parameters(), 0.01).state_dict())
    state["state"] = {
        i: {"step": torch.tensor(float(i)), "exp_avg": torch.zeros(s)} for i, s in enumerate(((11, 3), (40,)))
    }
    with pytest.raises(CheckpointError, match=r"have taken \[0, 1\] steps"):
        MoClip(parameters(), 0.01).load_state_dict(state)


def test_init_state_gives_zeros_that_change_nothing() -> None:
    plain, prepared = MoClip(parameters(), 0.01), MoClip(parameters(), 0.01)
    prepared.init_state()
    params = prepared.param_groups[0]["params"]
    assert prepared.param_groups[0]["step"] == 0 and all(
        not v.any() for p in params for v in prepared.state[p].values()
    )
    assert all(set(prepared.state[p]) == {"exp_avg", "exp_avg_sq"} for p in params)
    train(plain, range(3))
    train(prepared, range(3))
    assert all(torch.equal(a, b) for a, b in zip(plain.param_groups[0]["params"], params, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_angle": 0}, "max_angle must be above 0, got 0"),
        ({"max_angle": -45.0}, "max_angle must be above 0"),
        ({"max_angle": float("nan")}, "max_angle must be a finite number, got nan"),
        ({"max_angle": "wide"}, "max_angle must be a finite number, got 'wide'"),
        ({"max_angle": True}, "max_angle must be a finite number"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"clip_grad": -1}, "clip_grad must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas are two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, "betas are two numbers"),
        ({"betas": (0.9,)}, "betas are two numbers"),
        ({"betas": 0.9}, "betas are two numbers"),
        ({"obtuse": "restrat"}, "obtuse 'restrat' is not one of signed, restart, project; did you mean 'restart'?"),
        ({"scope": "tensors"}, "did you mean 'tensor'?"),
        ({"v_source": "clip"}, "did you mean 'clipped'?"),
        ({"max_angel": 45}, "optimizer 'moclip' has no option 'max_angel'; did you mean 'max_angle'?"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer("moclip", parameters(), **{"lr": 0.1, **options})


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown optimizer 'moclp'; did you mean 'moclip'\?"):
        build_optimizer("moclp", parameters(), 0.1)


@every
def test_float16_is_refused_also_in_groups_assigned_later(make: Case) -> None:
    with pytest.raises(ConfigError, match=r"\(11, 3\) is torch.float16"):
        make(parameters(torch.float16))
    opt = make(parameters())
    opt.param_groups = [{"params": parameters(torch.float16), "lr": 0.1, "weight_decay": 0.0}]
    with pytest.raises(ConfigError, match="float16"):
        opt.init_state()
    with pytest.raises(ConfigError, match="float16"):
        train(opt, range(1))


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="sparse=False"):
        MoClip(table.parameters(), 0.1).step()
