"""The tensor and pipeline sizes a model can be cut into, and the layers of each pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_replay.config import Layout
from megatron_replay.errors import LayoutError
from megatron_replay.models.spec import VOCAB_MULTIPLE, ModelSpec


def validate_layout(spec: ModelSpec, layout: Layout) -> list[int]:
    """Layers of each pipeline stage; LayoutError names the numbers that do not divide and the ways out."""
    _check_heads(spec, layout)
    _check_divides(spec.ffn_size, f"ffn_size={spec.ffn_size} is", layout.tensor)
    rows = spec.padded_vocab()
    rounded = f"{rows} vocabulary rows ({spec.vocab_size} rounded up to a multiple of {VOCAB_MULTIPLE}) are"
    _check_divides(rows, rounded, layout.tensor)
    return stage_layers(spec.num_layers, layout.pipeline, layout.split)


def stage_layers(num_layers: int, pipeline: int, split: Sequence[int] | None = None) -> list[int]:
    """The split as given, or an even one whose first stages take the remainder.

    LayoutError where a stage would stay empty.
    """
    if split is None:
        if not 1 <= pipeline <= num_layers:
            raise LayoutError(
                f"{num_layers} layers cannot fill layout.pipeline={pipeline} stages; use layout.pipeline=1 to "
                f"{num_layers}"
            )
        each, rest = divmod(num_layers, pipeline)
        return [each + (stage < rest) for stage in range(pipeline)]
    if len(split) != pipeline:
        raise LayoutError(
            f"layout.split={list(split)} has {len(split)} stages, but layout.pipeline={pipeline}; make them equal"
        )
    if min(split) < 1 or sum(split) != num_layers:
        raise LayoutError(
            f"layout.split={list(split)} must give every stage a layer and add up to {num_layers} layers, it adds up "
            f"to {sum(split)}"
        )
    return list(split)


def _check_heads(spec: ModelSpec, layout: Layout) -> None:
    _, groups = spec.padded_heads(layout.head_multiple)
    tensor = layout.tensor
    if groups % tensor == 0:
        return
    padded = f" ({spec.num_kv_heads} padded by layout.head_multiple={layout.head_multiple})"
    raise LayoutError(
        f"{groups} key/value heads{padded if groups != spec.num_kv_heads else ''} are not divisible by "
        f"layout.tensor={tensor}; set layout.head_multiple={tensor} (or {2 * tensor} for up to {2 * tensor} ranks) "
        f"to pad with zero heads, or use layout.tensor={_sizes(groups)}"
    )


def _check_divides(number: int, what: str, tensor: int) -> None:
    if number % tensor:
        raise LayoutError(f"{what} not divisible by layout.tensor={tensor}; use layout.tensor={_sizes(number)}")


def _sizes(number: int) -> str:
    """The divisors of a number that a tensor group can have, as prose; groups beyond 64 ranks are not worth naming."""
    divisors = [str(n) for n in range(1, min(number, 64) + 1) if number % n == 0]
    return divisors[0] if len(divisors) == 1 else f"{', '.join(divisors[:-1])} or {divisors[-1]}"
