"""Our arguments to the NPU's fused operators, against our torch forms: the operators' documented meaning in plain torch
(documented.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import documented
import pytest
import torch
from torch import Tensor

from megatron_replay.parallel.mcore import attention, layers
from megatron_replay.parallel.shims import fused_arguments as fused


@pytest.fixture
def on_npu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After the call our modules find the operators' documented forms, whatever the device, and may not ask torch for
    attention."""
    find = lambda name, device_type: documented.OPERATORS[name]  # noqa: E731

    def switch() -> None:
        for module in (attention, layers):
            monkeypatch.setattr(module, "fused_operator", find)
        monkeypatch.setattr(attention, "_sdpa", lambda *_, **__: pytest.fail("torch's attention was asked for"))

    return switch


def both_ways(
    function: Callable[..., Tensor], inputs: list[Tensor], on_npu: Callable[[], None]
) -> list[tuple[Tensor, Tensor]]:
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
def test_attention_within_segments(
    lengths: list[int], heads: tuple[int, int], scale: float | None, on_npu: Callable[[], None]
) -> None:
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


TREES = {
    "two branches": [(0, 20, -1), (20, 6, 0), (26, 4, 0)],
    "a prefix of a prefix": [(0, 9, -1), (9, 8, 0), (17, 3, 0), (20, 5, 1), (25, 1, 1), (26, 2, 3), (28, 4, 3)],
    "beside samples alone": [(0, 5, -1), (5, 5, -1), (10, 8, -1), (18, 3, -1), (21, 4, 2), (25, 6, 2), (31, 2, 3)],
    "a branch longer than a block": [(0, 6, -1), (6, 30, 0), (36, 3, 0), (39, 4, 1), (43, 20, 1)],
}
"""(start, length, parent) of each segment."""


@pytest.fixture(params=[1, 7, 256], ids=lambda rows: f"blocks of {rows}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(attention, "BLOCK", request.param)
    attention._blocks.cache_clear()
    yield request.param
    attention._blocks.cache_clear()


def in_a_tree(
    name: str, heads: tuple[int, int], scale: float | None, on_npu: Callable[[], None]
) -> list[tuple[Tensor, Tensor]]:
    """`both_ways` of attention in a row that ends with two tokens of padding."""
    torch.manual_seed(4)
    segments = torch.tensor(TREES[name])
    query, key, value = (torch.randn(int(segments[-1, :2].sum()) + 2, h, 8) for h in (heads[0], heads[1], heads[1]))
    return both_ways(lambda q, k, v: attention.attend(q, k, v, segments, scale), [query, key, value], on_npu)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("name", TREES)
def test_attention_in_a_tree(name: str, heads: tuple[int, int], block: int, on_npu: Callable[[], None]) -> None:
    pairs = in_a_tree(name, heads, None, on_npu)
    close(pairs)
    assert not pairs[0][1][-2:].any(), "tokens of no segment give zero"


def test_attention_in_a_tree_takes_the_scale(on_npu: Callable[[], None]) -> None:
    close(in_a_tree("a prefix of a prefix", (4, 2), 0.3, on_npu))


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "siblings are seen": lambda visible: torch.ones_like(visible).tril(visible.shape[1] - visible.shape[0]),
    "the first token is not seen": lambda visible: visible & (torch.arange(visible.shape[1]) > 0),
    "what is later is seen": lambda visible: torch.ones_like(visible),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_mask_would_be_seen(what: str, on_npu: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    right = fused.to_visible
    monkeypatch.setattr(attention, "to_visible", lambda visible, *rest: right(WRONG[what](visible), *rest))
    with pytest.raises(AssertionError, match="not close"):
        close(in_a_tree("two branches", (4, 2), None, on_npu))


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]).bool()


@pytest.mark.parametrize("form", ["within segments", "to what is visible"])
def test_the_fused_gradient_of_attention_is_that_of_its_forward(form: str) -> None:
    torch.manual_seed(1)
    if form == "within segments":
        q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
        arguments = fused.causal_within(torch.tensor([[0, 4], [4, 5]]), q, None)
    else:
        q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
        arguments = fused.to_visible(MASK, q[0], None)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = documented.npu_fusion_attention(*leaves, **arguments)[0]
    dy = torch.randn_like(out)
    known = {("scale_value" if name == "scale" else name): value for name, value in arguments.items()}
    grads = documented.npu_fusion_attention_grad(q, k, v, dy, **known)[:3]
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
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
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
