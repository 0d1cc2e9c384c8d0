"""The sums of an optimizer on a device without float64 (an NPU): chunks in float32 there, the chunks in float64 on the
host."""

from __future__ import annotations

import pytest
import torch

from megatron_replay.optim import stats


@pytest.mark.parametrize("elements", [0, 1, 4096, 10_000, 200_000])
def test_the_sums_of_a_tensor(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    g, m = torch.randn(elements), torch.randn(elements)
    truth, alone, squares = stats.tensor_sums(g, m), stats.tensor_sums(g), stats.sum_of_squares(g)
    monkeypatch.setattr(stats, "has_float64", lambda device: False)
    size = torch.stack([(m * g).abs().sum(), (m * m).sum(), (g * g).sum()]).double()
    assert ((stats.tensor_sums(g, m) - truth).abs() <= 2e-7 * size).all()
    torch.testing.assert_close(stats.tensor_sums(g), alone, rtol=2e-7, atol=0)
    torch.testing.assert_close(stats.sum_of_squares(g.view(-1, 1)), squares, rtol=2e-7, atol=0)


def test_bfloat16_gradients_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "has_float64", lambda device: False)
    ones = torch.full((5000,), 1 / 256, dtype=torch.bfloat16)
    assert stats.sum_of_squares(ones).item() == 5000 / 65536  # in bfloat16 the sum would stop growing
