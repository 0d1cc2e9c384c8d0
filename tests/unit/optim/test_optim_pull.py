"""RecAdam's pull towards the weights of the start."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_replay.errors import ConfigError
from megatron_replay.optim import AdamW
from megatron_replay.optim.pull import Pull


def test_the_share_of_the_task_grows_from_nothing_to_all() -> None:
    pull = Pull(1.0, k=0.5, t0=10)
    assert pull.task_weight(10) == 0.5
    assert pull.task_weight(0) == pytest.approx(1 / (1 + math.exp(5)))
    assert pull.task_weight(20) == pytest.approx(1 / (1 + math.exp(-5)))
    assert (Pull(1.0, 1e3, 1e3).task_weight(0), Pull(1.0, 1e3, 0).task_weight(10**6)) == (0.0, 1.0)  # nothing overflows
    assert Pull(0.0).task_weight(0) == 1.0


def test_the_method_written_out() -> None:
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, generator=gen, dtype=torch.float64)
    grads = [torch.randn(5, 3, generator=gen, dtype=torch.float64) for _ in range(8)]
    param = torch.nn.Parameter(start.clone())
    opt = AdamW([param], 0.02, pull=4.0, pull_k=0.7, pull_t0=4.0)
    theta, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, g in enumerate(grads, 1):
        param.grad = g
        opt.step()
        share = 1 / (1 + math.exp(-0.7 * (t - 4.0)))
        theta = theta - 0.02 * (1 - share) * 4.0 * (theta - start)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        theta = theta * (1 - 0.02 * share * 0.1) - 0.02 * share * step
    torch.testing.assert_close(param.detach(), theta, rtol=1e-12, atol=1e-12)


def test_it_stays_nearer_to_the_base() -> None:
    def distance(**options: float) -> float:
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(20, 20))
        start = param.detach().clone()
        opt = AdamW([param], 0.01, weight_decay=0.0, **options)  # type: ignore[arg-type]
        for _ in range(30):
            param.grad = torch.randn(20, 20)
            opt.step()
        return float((param.detach() - start).norm())

    assert distance(pull=20.0, pull_k=0.1, pull_t0=15) < 0.7 * distance()


def test_the_base_goes_along_with_the_state() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4))
    start = param.detach().clone()
    opt = AdamW([param], 0.1, pull=1.0)
    param.grad = torch.ones(4)
    opt.step()
    other = torch.nn.Parameter(param.detach().clone())
    resumed = AdamW([other], 0.1, pull=1.0)
    resumed.load_state_dict(opt.state_dict())
    assert torch.equal(resumed.state[other]["base"], start)


@pytest.mark.parametrize(
    "options", [{"pull": -1.0}, {"pull": 1.0, "pull_k": math.nan}, {"pull": 1.0, "pull_t0": math.inf}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{list(options)[-1]} must be"):
        AdamW([torch.nn.Parameter(torch.ones(2))], 0.1, **options)  # type: ignore[arg-type]


def test_a_pull_that_would_overshoot_is_refused_before_anything_moves() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    opt = AdamW([param], 0.1, pull=5000.0)
    with pytest.raises(ConfigError, match="keep lr \\* pull below 1"):
        opt.step()
    assert torch.equal(param, torch.ones(2))
