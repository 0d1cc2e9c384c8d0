"""Rotary position embedding as config.json describes it, in both of transformers' spellings.

transformers 5 writes `rope_parameters: {rope_theta, rope_type, ...}`; before, it was `rope_theta` and
`rope_scaling: {type | rope_type, factor, ...}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_replay.errors import CheckpointError

ROPE_BASE = 10_000.0
"""The base when config.json names none (transformers' default for every family here)."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The stretching of rotary frequencies for long contexts."""

    kind: Literal["linear", "llama3"]
    factor: float
    """Frequencies are divided by this: all of them (linear), or the low ones (llama3)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    """Context length before stretching (llama3)."""


def read_rope(config: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """(base, scaling) of a config.json.

    CheckpointError for types other than default, linear and llama3, and for partial rotary.
    """
    rope = {**_table(config, "rope_scaling", where), **_table(config, "rope_parameters", where)}
    base = _number(rope if "rope_theta" in rope else config, "rope_theta", where, ROPE_BASE)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise CheckpointError(
            f"{where}: partial_rotary_factor={partial} is not supported; only rotary over the whole head works"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling(kind="linear", factor=_number(rope, "factor", where))
    if kind == "llama3":
        return base, RopeScaling(
            kind="llama3",
            factor=_number(rope, "factor", where),
            low_freq_factor=_number(rope, "low_freq_factor", where),
            high_freq_factor=_number(rope, "high_freq_factor", where),
            original_max_positions=int(_number(rope, "original_max_position_embeddings", where)),
        )
    raise CheckpointError(f"{where}: rope type {kind!r} is not supported; known: default, linear, llama3")


def _table(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    table = config.get(key) or {}
    if not isinstance(table, Mapping) or any(isinstance(value, Mapping) for value in table.values()):
        raise CheckpointError(f"{where}: {key} must be one flat table for all layers, got {table!r}")
    return table


def _number(table: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = table.get(key, default)
    if value is None:
        raise CheckpointError(f"{where}: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{where}: {key} must be a number above 0, got {value!r}")
    return float(value)
