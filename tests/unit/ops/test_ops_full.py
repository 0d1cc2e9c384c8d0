"""The chunked full loss against torch's cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_replay.errors import DataError
from megatron_replay.ops import linear_cross_entropy, target_logprobs


def problem(n: int, v: int = 37, h: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(v, h, generator=g, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(v - 7, (n,), generator=g)


@pytest.mark.parametrize("n", [0, 1, 10])
@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("vocab", [None, 30])
def test_it_is_cross_entropy(n: int, chunk: int | None, vocab: int | None) -> None:
    hidden, weight, gold = problem(n)
    scale = torch.arange(1.0, n + 1, dtype=torch.float64)
    logits = hidden @ weight[:vocab].t()
    truth = cross_entropy(logits, gold, reduction="none") if n else logits.sum(1)
    loss = linear_cross_entropy(hidden, weight, gold, vocab_size=vocab, chunk_rows=chunk)
    torch.testing.assert_close(loss, truth, atol=1e-12, rtol=1e-12)
    wanted = torch.autograd.grad((truth * scale).sum(), (hidden, weight))
    torch.testing.assert_close(
        torch.autograd.grad((loss * scale).sum(), (hidden, weight)), wanted, atol=1e-12, rtol=1e-12
    )


def test_gradcheck() -> None:
    hidden, weight, gold = problem(4)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, gold, vocab_size=31, chunk_rows=3), (hidden, weight)
    )


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    hidden, weight, gold = problem(64)
    hidden, weight = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = linear_cross_entropy(hidden, weight, gold, chunk_rows=4)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    cross_entropy(exact[0] @ exact[1].t(), gold, reduction="sum").backward()
    for ours, right in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and right.grad is not None
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad.double() - right.grad).norm() < 1e-2 * right.grad.norm()


def test_log_probabilities_carry_no_gradient() -> None:
    hidden, weight, gold = problem(6)
    got = target_logprobs(hidden, weight, gold, vocab_size=30)
    assert not got.requires_grad
    want = torch.log_softmax(hidden @ weight[:30].t(), 1).gather(1, gold[:, None])[:, 0]
    torch.testing.assert_close(got, want.detach())
    assert (got.exp() <= 1).all()


def test_a_gold_id_outside_is_named() -> None:
    hidden, weight, gold = problem(3)
    with pytest.raises(DataError, match="gold id 30 of row 1 lies outside the vocabulary of 30"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 30, 1]), vocab_size=30)
    with pytest.raises(DataError, match="gold id 37"):
        linear_cross_entropy(hidden, weight, torch.tensor([0, 37, 1]))
    with pytest.raises(DataError, match="one gold id a row"):
        linear_cross_entropy(hidden, weight, gold[:2])
