"""How far a number moved from the base model's: the measure of what fine-tuning forgot."""

from __future__ import annotations

import math


def relative_change(before: float, after: float) -> float:
    """(after - before) / |before|: +0.1 says ten percent more than before. From zero it is 0 (still zero) or an
    infinity; NaN stays NaN."""
    if before == 0:
        return 0.0 if after == 0 else math.nan if math.isnan(after) else math.copysign(math.inf, after)
    return (after - before) / abs(before)
