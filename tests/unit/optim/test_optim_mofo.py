"""MoFO and the selection of its threshold."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.optim import AdamW, MoFO
from megatron_replay.optim.radix import ShardValues, thresholds

VALUES = st.one_of(st.floats(-(2.0**90), 2.0**90, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38]))


def alone(table: Tensor) -> Tensor:
    return table


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.lists(VALUES, min_size=1, max_size=60), min_size=1, max_size=4),
    st.floats(0.01, 1.0),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 60),
)
def test_threshold_is_the_kth_largest_of_the_whole_tensor(
    rows: list[list[float]], fraction: float, dtype: torch.dtype, cut: int
) -> None:
    tensors = [torch.tensor(row, dtype=torch.float32).to(dtype) for row in rows]
    pieces = [ShardValues(part, row, True) for row, t in enumerate(tensors) for part in (t[:cut], t[cut:])]
    pieces += [ShardValues(tensors[0], 0, False)]  # a replica that another rank counts
    for tensor, found in zip(tensors, thresholds(pieces, len(rows), fraction, alone), strict=True):
        k = max(1, math.ceil(fraction * len(tensor) - 1e-9))
        assert found == tensor.abs().sort(descending=True).values[k - 1]


def test_a_rank_without_pieces_keeps_pace() -> None:
    """Float64 needs more rounds than float32; a rank that holds nothing learns it from the first sum."""
    calls = {"holder": 0, "idle": 0}
    tables: list[Tensor] = []

    def holder(table: Tensor) -> Tensor:
        calls["holder"] += 1
        tables.append(table.clone())
        return table

    def idle(table: Tensor) -> Tensor:
        calls["idle"] += 1
        return table + tables[calls["idle"] - 1]

    doubles, singles = torch.linspace(-3, 5, 99, dtype=torch.float64), torch.linspace(0, 1, 30)
    found = thresholds([ShardValues(doubles, 1, True), ShardValues(singles, 0, True)], 2, 0.2, holder)
    assert thresholds([], 2, 0.2, idle) == found and calls["idle"] == calls["holder"] == 7


def naive(param: Tensor, grads: list[Tensor], *, lr: float, fraction: float, wd: float) -> Tensor:
    """The method as it is written, with torch's own quantile-free selection."""
    theta, m, v = param.clone(), torch.zeros_like(param), torch.zeros_like(param)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        if param.ndim > 1:
            kept = m.abs().flatten().topk(math.ceil(fraction * m.numel())).values[-1]
            step = step * (m.abs() >= kept)
        theta = theta * (1 - lr * wd) - lr * step
    return theta


@pytest.mark.parametrize("shape", [(12, 10), (33,), (1, 7)])
def test_mofo_is_the_method_written_out(shape: tuple[int, ...]) -> None:
    gen = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=gen, dtype=torch.float64)
    grads = [torch.randn(shape, generator=gen, dtype=torch.float64) for _ in range(5)]
    param = torch.nn.Parameter(start.clone())
    opt = MoFO([param], 0.02, fraction=0.2)
    for g in grads:
        param.grad = g
        opt.step()
    torch.testing.assert_close(
        param.detach(), naive(start, grads, lr=0.02, fraction=0.2, wd=0.1), rtol=1e-12, atol=1e-12
    )


def test_ties_stay_and_the_whole_is_adamw() -> None:
    ours, adamw = (torch.nn.Parameter(torch.ones(4, 5)) for _ in range(2))
    for param, opt in ((ours, MoFO([ours], 0.1, fraction=0.1)), (adamw, AdamW([adamw], 0.1))):
        param.grad = torch.ones(4, 5)  # all momenta alike: all stay
        opt.step()
    assert torch.equal(ours, adamw)
    ours, adamw = (torch.nn.Parameter(torch.ones(4, 5)) for _ in range(2))
    for param, opt in ((ours, MoFO([ours], 0.1, fraction=1)), (adamw, AdamW([adamw], 0.1))):
        param.grad = torch.arange(20.0).view(4, 5)
        opt.step()
    assert torch.equal(ours, adamw)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, math.nan, "a lot", True])
def test_fraction_is_a_share(fraction: object) -> None:
    with pytest.raises(ConfigError, match="fraction must be a share"):
        MoFO([torch.nn.Parameter(torch.ones(2))], 0.1, fraction=fraction)  # type: ignore[arg-type]
