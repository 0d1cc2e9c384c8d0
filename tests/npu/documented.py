"""Plain-torch forms of the NPU's fused operators, written from torch-npu's documentation.

NOT the operators: no test here runs those.

They answer whether our arguments say what we mean; that the device does what its documentation says can only be seen on
a device. What the documentation leaves out (the order of roundings) is done in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Ends = Sequence[int] | None
"""Cumulative lengths of the samples (TND)."""


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *,
    atten_mask: Tensor, scale: float, sparse_mode: int, actual_seq_qlen: Ends = None, actual_seq_kvlen: Ends = None,
    **others: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Attention as the operator's page describes it; groups of query heads have a common key head.

    - TND layout: [T, heads, D], samples after each other up to the cumulative lengths. BSND: [B, S, heads, D].
    - True is masked.
    - sparse_mode 1 (allMask): the mask is [Sq, Sk], for the whole batch. A row that is all True loses precision.
    - sparse_mode 3 (rightDownCausal): the mask is the compressed 2048 x 2048 upper triangle. It stands for the one that
      ends at the lower right corner.
    - Both modes ignore pre_tockens and next_tockens.
    """
    assert all(_is_default(name, value) for name, value in others.items()), others
    cut = partial(_samples, layout=input_layout, heads=head_num)
    parts = []
    for each in zip(
        cut(query, ends=actual_seq_qlen), *(cut(x, ends=actual_seq_kvlen) for x in (key, value)), strict=True
    ):
        q, k, v = (_heads(x, head_num) for x in each)
        parts.append((_weights(q, k, scale, atten_mask, sparse_mode) @ v).transpose(0, 1).to(query.dtype))
    out = torch.cat(parts).view(query.shape)
    unread = torch.zeros(query.shape[0], head_num, 8)
    return out, unread, unread, torch.zeros(0), 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    atten_mask: Tensor, scale_value: float, sparse_mode: int,
    actual_seq_qlen: Ends = None, actual_seq_kvlen: Ends = None,
    **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    cut = partial(_samples, layout=input_layout, heads=head_num)
    over_queries = (cut(x, ends=actual_seq_qlen) for x in (query, dy, grads[0]))
    over_keys = (cut(x, ends=actual_seq_kvlen) for x in (key, value, *grads[1:]))
    for *asking, dq, k, v, dk, dv in zip(*over_queries, *over_keys, strict=True):
        keys, values, queries, g = (_heads(x, head_num) for x in (k, v, *asking))
        p = _weights(queries, keys, scale_value, atten_mask, sparse_mode)
        dp = g @ values.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale_value
        dq.copy_(ds @ keys)
        for whole, part in ((dk, ds.transpose(1, 2) @ queries), (dv, p.transpose(1, 2) @ g)):
            whole.copy_(part.view(whole.shape[0], -1, *part.shape[1:]).sum(1))
    return *(x.to(query.dtype) for x in grads), torch.zeros(0), torch.zeros(0)


def _samples(x: Tensor, *, layout: str, heads: int, ends: Ends) -> list[Tensor]:
    """Views [h, L, D] of each sample of a batch."""
    if layout == "BSND":
        assert x.dim() == 4 and heads % x.shape[2] == 0 and not ends
        return [x[i].transpose(0, 1) for i in range(x.shape[0])]
    assert layout == "TND" and x.dim() == 3 and heads % x.shape[1] == 0 and ends and ends[-1] == x.shape[0]
    return [x[begin:end].transpose(0, 1) for begin, end in zip([0, *ends], ends, strict=False)]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[h, L, D] -> [heads, L, D] float32, each of the h repeated for its group."""
    return x.float().repeat_interleave(heads // x.shape[0], 0)


def _weights(q: Tensor, k: Tensor, scale: float, atten_mask: Tensor, sparse_mode: int) -> Tensor:
    assert atten_mask.dtype == torch.bool
    if sparse_mode == 3:
        assert torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
        atten_mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    else:
        assert sparse_mode == 1 and atten_mask.shape == (q.shape[1], k.shape[1]) and not atten_mask.all(1).any()
    return (q @ k.transpose(1, 2) * scale).masked_fill(atten_mask, -torch.inf).softmax(-1)


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * gamma, and 1 / sqrt(mean(x^2) + eps) [..., 1] float32."""
    x = input.float()
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    x, g, normed = input.float(), dy.float() * gamma.float(), input.float() * rstd
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(input.dtype).view_as(x), (dy.float() * normed).flatten(0, -2).sum(0)


def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: None = None) -> Tensor:
    """x1, x2 = halves of the last dimension: r1 x + r2 (-x2, x1).

    SBND: r1 and r2 are [S, 1, 1, D]; D is even and below 896.
    """
    assert (
        rotary_mode == "half"
        and rotate is None
        and input.dim() == 4
        and input.shape[3] % 2 == 0
        and input.shape[3] < 896
    )
    assert r1.shape == r2.shape == (input.shape[0], 1, 1, input.shape[3]) and r1.dtype == input.dtype
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), -1)


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, ...]:
    (g1, g2), (a1, a2), (b1, b2) = (x.chunk(2, -1) for x in (grad, r1, r2))
    return torch.cat((a1 * g1 + b2 * g2, a2 * g2 - b1 * g1), -1), torch.zeros_like(r1), torch.zeros_like(r2)


OPERATORS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        npu_fusion_attention,
        npu_fusion_attention_grad,
        npu_rms_norm,
        npu_rms_norm_backward,
        npu_rotary_mul,
        npu_rotary_mul_backward,
    )
}


def _is_default(name: str, value: Any) -> bool:
    return value in {
        "keep_prob": (1.0,),
        "pre_tockens": (2147483647,),
        "next_tockens": (2147483647,),
        "gen_mask_parallel": (True,),
    }.get(name, (None, 0, False, ""))
