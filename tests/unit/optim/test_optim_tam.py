"""Torque-aware momentum, both forms, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.optim import TAM, AdamW

SHAPES = [(6, 5), (9,)]


def draws(seed: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in SHAPES]


def run(opt: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    for seed in steps:
        for p, g in zip(params, draws(seed), strict=True):
            p.grad = g
        opt.step()


def naive(variant: str, scope: str, steps: int, lr: float) -> list[Tensor]:
    theta, m, v = draws(99), [torch.zeros_like(x) for x in draws(99)], [torch.zeros_like(x) for x in draws(99)]
    s = [0.0, 0.0]
    for t in range(1, steps + 1):
        g = draws(t - 1)
        together = [(sum(float((a * b).sum()) for a, b in zip(x, y, strict=True))) for x, y in ((m, g), (m, m), (g, g))]
        for i in range(2):
            c, mm, gg = (
                together
                if scope == "global"
                else [float((a * b).sum()) for a, b in ((m[i], g[i]), (m[i], m[i]), (g[i], g[i]))]
            )
            cosine = c / math.sqrt(mm * gg) if mm else math.nan
            if variant == "paper":
                factor, new = (1.0 if math.isnan(cosine) else max(0.0, cosine)), 0.9 * m[i] + 0.1 * g[i]
            else:
                s[i] = 0.9 * s[i] + 0.1 * (0.0 if math.isnan(cosine) else cosine)
                factor, new = 1.0, 0.9 * m[i] + (1e-8 + (1 + s[i]) / 2) * g[i]
            v[i] = 0.95 * v[i] + 0.05 * g[i] ** 2
            step = new / (1 - 0.9**t) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-8)
            theta[i] = theta[i] * (1 - lr * 0.1) - lr * factor * step
            m[i] = new
    return theta


@pytest.mark.parametrize("variant", ["paper", "adatamw"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_method_written_out(variant: str, scope: str) -> None:
    params = [torch.nn.Parameter(x) for x in draws(99)]
    run(TAM(params, 0.01, variant=variant, scope=scope), params, range(6))  # type: ignore[arg-type]
    for ours, theirs in zip(params, naive(variant, scope, 6, 0.01), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-11, atol=1e-11)


def test_a_gradient_against_the_momentum_does_not_move_the_paper_s_form() -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    opt = TAM([param], 0.1, variant="paper", weight_decay=0.0)
    param.grad = torch.full((3, 2), 2.0)
    opt.step()
    before = param.detach().clone()
    param.grad = torch.full((3, 2), -1.0)
    opt.step()
    assert torch.equal(param, before) and opt.metrics["tam/cosine_mean"] == pytest.approx(-1)


def test_the_first_step_of_the_paper_s_form_is_adamw_s() -> None:
    ours, theirs = ([torch.nn.Parameter(x) for x in draws(99)] for _ in range(2))
    run(TAM(ours, 0.01, variant="paper"), ours, range(1))
    run(AdamW(theirs, 0.01), theirs, range(1))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_similarities_are_saved_and_belong_to_a_scope() -> None:
    straight = [torch.nn.Parameter(x) for x in draws(99)]
    run(TAM(straight, 0.01), straight, range(6))
    first = [torch.nn.Parameter(x) for x in draws(99)]
    opt = TAM(first, 0.01)
    run(opt, first, range(3))
    second = [torch.nn.Parameter(x.detach().clone()) for x in first]
    resumed = TAM(second, 0.01)
    resumed.load_state_dict(opt.state_dict())
    run(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
    other = TAM(second, 0.01, scope="global")
    other.load_state_dict(opt.state_dict())
    with pytest.raises(CheckpointError, match="2 similarities, scope='global' has 1"):
        run(other, second, range(1))


BAD = [({"variant": "adatam"}, "adatamw"), ({"decay": 1.0}, "decay"), ({"scope": "all"}, "scope")]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TAM([torch.nn.Parameter(torch.ones(2))], 0.1, **options)  # type: ignore[arg-type]
