"""Our arguments to the NPU's fused operators, against our torch forms: the operators' documented meaning in plain torch (documented.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import documented
import pytest
import torch
from torch import Tensor

from megatron_replay.parallel import attention, fused, layers


@pytest.fixture
def on_npu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After the call our modules find the operators' documented forms, whatever the device."""
    find = lambda name, device_type: documented.OPERATORS[name]  # noqa: E731

    def switch() -> None:
        for module in (attention, layers):
            monkeypatch.setattr(module, "fused_operator", find)

    return switch


def both_ways(function: Callable[..., Tensor], inputs: list[Tensor], on_npu: Callable[[], None]) -> list[tuple[Tensor, Tensor]]:
    """(torch form, fused form) of the result and of each input's gradient."""
    found = []
    for change in (lambda: None, on_npu):
        change()
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves)])
    return list(zip(*found, strict=True))


def close(pairs: list[tuple[Tensor, Tensor]], tolerance: float = 2e-6) -> None:
    for ours, theirs in pairs:
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("lengths", [[7], [3, 3, 5], [1, 6, 2], [4, 4]], ids=str)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_within_segments(lengths: list[int], heads: tuple[int, int], scale: float | None, on_npu: Callable[[], None]) -> None:
    torch.manual_seed(0)
    padding = 2
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    segments = torch.stack([starts, torch.tensor(lengths), torch.full((len(lengths),), -1)], 1)
    query, key, value = (torch.randn(sum(lengths) + padding, h, 8) for h in (heads[0], heads[1], heads[1]))
    pairs = both_ways(lambda q, k, v: attention.attend(q, k, v, segments, scale), [query, key, value], on_npu)
    close(pairs)
    assert not pairs[0][1][-padding:].any(), "tokens of no segment give zero"


def test_attention_wants_neighbouring_segments() -> None:
    with pytest.raises(AssertionError, match="follow each other"):
        fused.causal_within(torch.tensor([[0, 3], [4, 2]]), torch.zeros(6, 2, 8), None)


def test_the_fused_gradient_of_attention_is_that_of_its_forward() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    arguments = fused.causal_within(torch.tensor([[0, 4], [4, 5]]), q, None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = documented.npu_fusion_attention(*leaves, **arguments)[0]
    dy = torch.randn_like(out)
    known = {name: arguments[name] for name in ("head_num", "input_layout", "actual_seq_qlen", "actual_seq_kvlen")}
    grads = documented.npu_fusion_attention_grad(q, k, v, dy, scale_value=arguments["scale"], **known)[:3]
    close(list(zip(torch.autograd.grad(out, leaves, dy), grads, strict=True)))


@pytest.mark.parametrize("shape", [(5, 1, 16), (3, 1, 4, 8)], ids=["of hidden states", "of heads"])
def test_norm(shape: tuple[int, ...], on_npu: Callable[[], None]) -> None:
    torch.manual_seed(2)
    norm = layers.RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), shape[-1], eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    x = torch.randn(shape) * 0.05  # small, so that eps matters
    close(both_ways(norm, [x], on_npu))


def plain_rotation(
    t: Tensor, freqs: Tensor, rotary_interleaved: bool = False, multi_latent_attention: bool = False, mscale: float = 1.0
) -> Tensor:
    from megatron_replay.parallel import shims

    shims.import_megatron()
    from megatron.core.models.common.embeddings import rope_utils

    return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved, multi_latent_attention, mscale)


@pytest.mark.parametrize("mscale", [1.0, 0.5])
def test_rotation(mscale: float) -> None:
    torch.manual_seed(3)
    t, half = torch.randn(6, 1, 4, 8), torch.randn(6, 1, 1, 4)
    freqs = torch.cat([half, half], -1)
    asked: list[Any] = []

    def find(name: str, device_type: str) -> Any:
        asked.append(name)
        return documented.OPERATORS[name]

    ours = fused.rotary(plain_rotation, find)
    close([(plain_rotation(t, freqs, mscale=mscale), ours(t, freqs, mscale=mscale))])
    assert asked == ["npu_rotary_mul"]
    grad, x = torch.randn_like(t), t.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(plain_rotation(x, freqs), x, grad)
    close([(wanted, documented.npu_rotary_mul_backward(grad, t, freqs.cos(), freqs.sin())[0])])


@pytest.mark.parametrize("case", ["interleaved", "part of the head", "three dimensions"])
def test_a_rotation_that_the_fused_operator_lacks_stays_megatrons(case: str) -> None:
    t, freqs, options = torch.randn(6, 1, 4, 8), torch.randn(6, 1, 1, 8), {}
    if case == "interleaved":
        options = {"rotary_interleaved": True}
    elif case == "part of the head":
        freqs = freqs[..., :4]
    else:
        t, freqs = t[:, :, 0], freqs[:, :, 0]
    ours = fused.rotary(plain_rotation, lambda name, device_type: pytest.fail("asked for the fused operator"))
    assert torch.equal(ours(t, freqs, **options), plain_rotation(t, freqs, **options))
