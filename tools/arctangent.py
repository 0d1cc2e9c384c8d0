"""Compute the coefficients in csrc/cpu/arctangent.h: atan(t) = t + t z Q(z) with z = t^2.

    python tools/arctangent.py [terms]

They have the least relative error for t in [0, 1]. Lawson's iteration (least squares whose weights grow where the error
is largest) in float64 converges to the minimax polynomial. Then the coefficients are rounded to float32. The tool
prints them, and the largest error of the polynomial itself, before any float32 arithmetic.
"""

from __future__ import annotations

import sys

import numpy as np


def minimax(terms: int, points: int = 4000, rounds: int = 400) -> np.ndarray:
    """Q's coefficients [terms], lowest power first."""
    z = (1 - np.cos(np.linspace(0, np.pi, points))) / 2
    z = z[z > 1e-8]
    t = np.sqrt(z)
    ratio = np.arctan(t) / t
    # the relative error is (1 + z Q) / ratio - 1, linear in Q
    matrix = np.stack([z ** (k + 1) for k in range(terms)], 1) / ratio[:, None]
    target = 1 - 1 / ratio
    weight = np.full(len(z), 1 / len(z))
    for _ in range(rounds):
        root = np.sqrt(weight)[:, None]
        q = np.linalg.lstsq(matrix * root, target * root[:, 0], rcond=None)[0]
        error = np.abs(matrix @ q - target)
        weight *= error
        weight /= weight.sum()
    return q


def main() -> None:
    q = minimax(int(sys.argv[1]) if len(sys.argv) > 1 else 8).astype(np.float32)
    t = np.linspace(1e-6, 1, 1_000_001)
    z = t * t
    value = t + t * z * np.polyval(q[::-1].astype(np.float64), z)
    print(
        "largest relative error", np.abs(value / np.arctan(t) - 1).max(), "(half a float32 ulp is 2.98e-08 to 5.96e-08)"
    )
    print(", ".join(f"{c:.9g}f" for c in q))


if __name__ == "__main__":
    main()
