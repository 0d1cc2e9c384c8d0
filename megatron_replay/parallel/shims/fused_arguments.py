"""Arguments of the NPU's fused operators, which stand in for our torch forms.

The operators themselves come from `device.fused_operator`. Sources: the pages of `npu_fusion_attention`, `npu_rms_norm`
and `npu_rotary_mul` in the API reference of Ascend Extension for PyTorch.

T tokens in the flat micro-batch, Hq query heads, Hk key heads, Q queries, K keys, D head size. B is the batch (1) and S
the sequence (T, or this rank's part of it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_MASK = 2048
"""Side of the triangle that stands for the whole causal mask in the compressed mask modes."""
_ALL_MASK = 1
_RIGHT_DOWN_CAUSAL = 3


def causal_within(segments: Tensor, query: Tensor, scale: float | None) -> dict[str, Any]:
    """Arguments of `npu_fusion_attention` for causal attention within each segment.

    They are those after query, key and value [T, heads, D]. segments [n, 3] (start, length, -1; int64, on the CPU)
    follow each other from token 0 to the end of the three tensors.
    """
    ends = segments[:, :2].sum(1).tolist()
    assert segments[:, 0].tolist() == [0, *ends[:-1]], "segments must follow each other"
    return {
        "head_num": query.shape[1],
        "input_layout": "TND",
        "scale": scale or 1 / math.sqrt(query.shape[2]),
        "atten_mask": _later(query.device),
        "sparse_mode": _RIGHT_DOWN_CAUSAL,
        "actual_seq_qlen": ends,
        "actual_seq_kvlen": ends,
    }


def to_visible(visible: Tensor, query: Tensor, scale: float | None) -> dict[str, Any]:
    """Arguments of `npu_fusion_attention` for attention to the visible keys.

    They are those after query, key and value, each a batch of one. query [Q, Hq, D] is without the batch; visible [Q,
    K] is bool. Every query sees a key, which the operator's precision needs.

    The operator's page says of the others:
    - sparse_mode 1 (allMask) takes the whole mask, True where a key takes no part.
    - It reads neither pre_tockens nor next_tockens.
    - The mask may be [Q, K] for all heads.
    - Q and K are free up to a million, D up to 768, and Hq is a multiple of Hk up to 256.
    """
    return {
        "head_num": query.shape[1],
        "input_layout": "BSND",
        "scale": scale or 1 / math.sqrt(query.shape[2]),
        "atten_mask": ~visible,
        "sparse_mode": _ALL_MASK,
    }


@cache
def _later(device: torch.device) -> Tensor:
    """The mask: True where a key is later than the query. It takes 4 MiB, once a device."""
    return torch.ones(_MASK, _MASK, dtype=torch.bool, device=device).triu(1)


def rotary(
    plain: Callable[..., Tensor], operator: Callable[[str, str], Callable[..., Any] | None]
) -> Callable[..., Tensor]:
    """megatron's `_apply_rotary_pos_emb_bshd` with `npu_rotary_mul` where `operator` has it; `plain` is megatron's own.

    The fused operator rotates the two halves of whole heads [S, B, heads, D] by cosines and sines [S, 1, 1, D]. This is
    its SBND layout.
    """

    def apply(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> Tensor:
        whole_halves = (
            t.dim() == 4 and freqs.shape[-1] == t.shape[-1] and not rotary_interleaved and not multi_latent_attention
        )
        fused = operator("npu_rotary_mul", t.device.type) if whole_halves else None
        if fused is None:
            return plain(
                t,
                freqs,
                rotary_interleaved=rotary_interleaved,
                multi_latent_attention=multi_latent_attention,
                mscale=mscale,
            )
        out: Tensor = fused(t, (freqs.cos() * mscale).to(t.dtype), (freqs.sin() * mscale).to(t.dtype))
        return out

    return apply
