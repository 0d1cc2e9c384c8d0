"""Plain-torch forms of the NPU's fused operators, written from torch-npu's documentation. NOT the operators: no test here runs those.

They answer whether our arguments say what we mean; that the device does what its documentation says can only be seen on a device. What
the documentation leaves out (the order of roundings) is done in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def npu_fusion_attention(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, *,
    atten_mask: Tensor, scale: float, actual_seq_qlen: Sequence[int], actual_seq_kvlen: Sequence[int], sparse_mode: int,
    **others: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """TND layout: [T, heads, D], rows of a batch after each other up to the cumulative lengths; groups of query heads share a key head.

    sparse_mode 3 (rightDownCausal): the mask is the compressed 2048 x 2048 upper triangle and stands for the one that ends at the lower
    right corner; True is masked; pre_tockens and next_tockens are ignored.
    """
    assert all(_is_default(name, value) for name, value in others.items()), others
    assert input_layout == "TND" and sparse_mode == 3 and head_num == query.shape[1] and head_num % key.shape[1] == 0
    assert atten_mask.dtype == torch.bool and torch.equal(atten_mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    out = torch.empty_like(query)
    for rows, columns in _pieces(actual_seq_qlen, actual_seq_kvlen, query, key):
        q, k, v = _heads(query[rows], head_num), _heads(key[columns], head_num), _heads(value[columns], head_num)
        out[rows] = (_weights(q, k, scale) @ v).transpose(0, 1).to(out.dtype)
    unread = torch.zeros(query.shape[0], head_num, 8)
    return out, unread, unread, torch.zeros(0), 0, 0, 0


def npu_fusion_attention_grad(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, head_num: int, input_layout: str, *,
    scale_value: float, actual_seq_qlen: Sequence[int], actual_seq_kvlen: Sequence[int],
    **others: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    for rows, columns in _pieces(actual_seq_qlen, actual_seq_kvlen, query, key):
        q, k, v, g = (_heads(x, head_num) for x in (query[rows], key[columns], value[columns], dy[rows]))
        p = _weights(q, k, scale_value)
        dp = g @ v.transpose(1, 2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale_value
        for whole, cut, part in zip(grads, (rows, columns, columns), (ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ g), strict=True):
            whole[cut] = part.view(whole.shape[1], -1, *part.shape[1:]).sum(1).transpose(0, 1)
    return *(x.to(query.dtype) for x in grads), torch.zeros(0), torch.zeros(0)


def _pieces(q_ends: Sequence[int], k_ends: Sequence[int], query: Tensor, key: Tensor) -> list[tuple[slice, slice]]:
    assert q_ends[-1] == query.shape[0] and k_ends[-1] == key.shape[0]
    cuts = [[slice(a, b) for a, b in zip([0, *ends], ends, strict=False)] for ends in (q_ends, k_ends)]
    return list(zip(*cuts, strict=True))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[L, h, D] -> [heads, L, D] float32, each of the h repeated for its group."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    later = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return (q @ k.transpose(1, 2) * scale).masked_fill(later, -torch.inf).softmax(-1)


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
    """x1, x2 = halves of the last dimension: r1 x + r2 (-x2, x1). SBND: r1 and r2 are [S, 1, 1, D]; D is even and below 896."""
    assert rotary_mode == "half" and rotate is None and input.dim() == 4 and input.shape[3] % 2 == 0 and input.shape[3] < 896
    assert r1.shape == r2.shape == (input.shape[0], 1, 1, input.shape[3]) and r1.dtype == input.dtype
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), -1)


def npu_rotary_mul_backward(grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> tuple[Tensor, ...]:
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
    return value in {"keep_prob": (1.0,), "pre_tockens": (2147483647,), "next_tockens": (2147483647,), "gen_mask_parallel": (True,)}.get(
        name, (None, 0, False, "")
    )
