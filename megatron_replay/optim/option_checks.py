"""Checks of optimizers' options; each message names the option, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from megatron_replay.errors import ConfigError
from megatron_replay.registry import nearest


def check_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> None:
    """Raise ConfigError unless `value` is a finite number in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    if above is not None and not value > above:
        raise ConfigError(f"{name} must be above {above:g}, got {value}")
    if at_least is not None and not value >= at_least:
        raise ConfigError(f"{name} must be at least {at_least:g}, got {value}")


def check_beta(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a number in [0, 1)."""
    check_number(name, value, at_least=0)
    if not value < 1:  # type: ignore[operator]
        raise ConfigError(f"{name} must be below 1, got {value}")


def check_betas(value: Sequence[float]) -> tuple[float, float]:
    """Raise ConfigError unless these are two numbers in [0, 1)."""
    betas = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
        raise ConfigError(f"betas are two numbers in [0, 1), got {value!r}")
    return betas


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """Raise ConfigError, with the nearest name, unless `value` is one of `known`."""
    if value not in known:
        raise ConfigError(f"{name} {value!r} is not one of {', '.join(known)}; {nearest(str(value), known)}")
