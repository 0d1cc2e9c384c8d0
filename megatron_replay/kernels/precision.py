"""The dtype in which a device adds up."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    """True where torch computes in float64 on this device itself.

    An NPU would send such operators to the host, one by one.
    """
    return device.type in ("cpu", "cuda")
