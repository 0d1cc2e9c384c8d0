"""Two modules that replace megatron's own in its GPTModel: a norm for sequence parallelism, and rotary angles.

T tokens in the flat micro-batch, H hidden, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from megatron_replay.device import fused_operator
from megatron_replay.models.spec import ModelSpec


class RMSNorm(nn.Module):
    """Root-mean-square norm, with statistics in fp32 at least.

    megatron's torch norm refuses sequence parallelism. Here the weight is marked, so that `finalize_model_grads` sums
    its gradient over the tensor group.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        fused = fused_operator("npu_rms_norm", x.device.type)
        if fused is not None:
            out: Tensor = fused(x, self.weight, self.eps)[0]
            return out
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class TokenRotary(nn.Module):
    """Rotary angles of each token's own position.

    Packed samples, cached tokens and branches of a tree need no special case. `positions` [1, T] is set for a
    micro-batch just before the model's forward. That calls this module once, outside any recomputed part.
    """

    positions: Tensor
    frequencies: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.register_buffer("frequencies", rotary_frequencies(spec), persistent=False)

    def get_rotary_seq_len(self, *_: Any) -> int:
        """0: megatron asks for the length of a table, and there is none."""
        return 0

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Angles [T, 1, 1, D]."""
        angles = torch.outer(self.positions.reshape(-1).float(), self.frequencies)
        return torch.cat([angles, angles], -1)[:, None, None, :]


def rotary_frequencies(spec: ModelSpec) -> Tensor:
    """Angle per position of each of the D/2 rotary pairs, fp32, with the model's `linear` or `llama3` scaling."""
    half = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_base**half)
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: long wavelengths are divided by the factor, short ones kept, those between interpolated
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)
    smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
