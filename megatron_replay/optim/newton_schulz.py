"""Newton-Schulz orthogonalisation, the heart of Muon (Keller Jordan's quintic iteration)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Keller Jordan chose them for the steepest slope at zero; the singular values end in about 0.7..1.2, not at 1."""

Precision = Literal["auto", "bfloat16", "float32"]
PRECISIONS = get_args(Precision)


def orthogonalised(matrix: Tensor, *, steps: int = 5, precision: Precision = "auto") -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of a matrix [rows, cols], in its dtype; zero stays zero.

    precision: that of the products. auto is bfloat16, as published, but float32 on cpu. There bfloat16 products are
    fast on some processors and very slow on others, and runs are compared. float64 matrices are computed in float64.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(_dtype(matrix, precision))
    x = x / x.norm().clamp(min=1e-7)  # so that no singular value is above 1
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def _dtype(matrix: Tensor, precision: Precision) -> torch.dtype:
    if matrix.dtype == torch.float64:
        return torch.float64
    low = precision == "bfloat16" or (precision == "auto" and matrix.device.type != "cpu")
    return torch.bfloat16 if low else torch.float32
