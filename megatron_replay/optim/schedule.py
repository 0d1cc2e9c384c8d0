"""The learning rate over a run, as Megatron's scheduler computes it, so that the numbers in the logs agree."""

from __future__ import annotations

import math
from typing import Literal, get_args

from megatron_replay.errors import ConfigError
from megatron_replay.optim.option_checks import check_choice

Style = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, *, peak: float, minimum: float, warmup: int, total: int, style: Style = "cosine") -> float:
    """The rate after `step` steps.

    It rises linearly from 0 to `peak` over `warmup` steps, then follows the style down to `minimum` at `total` and
    beyond. Raises ConfigError for an unknown style, a warm-up as long as the run, or a minimum above the peak.
    """
    check_choice("schedule style", style, get_args(Style))
    if not 0 <= warmup < total:
        raise ConfigError(f"warm-up must be shorter than the run, got {warmup} of {total} steps")
    if not 0 <= minimum <= peak:
        raise ConfigError(f"the final learning rate must lie in 0..{peak} (the peak), got {minimum}")
    if warmup > 0 and step <= warmup:
        return peak * float(step) / float(warmup)
    if style == "constant":
        return peak
    if step > total:
        return minimum
    ratio = (step - warmup) / (total - warmup)
    factor = 0.5 * (math.cos(math.pi * ratio) + 1.0) if style == "cosine" else 1.0 - ratio
    return minimum + factor * (peak - minimum)
