"""Half fine-tuning (arXiv 2404.18466, category-level selection): the tensors that are not trained, chosen by name."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from megatron_replay.errors import ConfigError

ATTENTION = "att"
"""Part of the names of attention's tensors: self_attn, self_attention, attn, attention."""


def half(named_parameters: Iterable[tuple[str, Any]], share: float = 0.5, seed: int = 42) -> list[str]:
    """Names of the tensors to freeze: in every layer a random fraction of attention's, the MLP's, and the vectors.

    Attention and MLP count their matrices; vectors are norms. `share` is the fraction.

    named_parameters: (name, anything with a `shape`), as `model.named_parameters()` of any torch model gives them. A
    layer is the first number in a name; a tensor without one (embedding, output layer, final norm) is trained. A fused
    tensor is one tensor.

    A layer's number of tensors to freeze may not be whole, such as one and a half of three MLP matrices. Random layers
    round it up and the others down, so that the sum is right to within one tensor. The choice is a function of names,
    share and seed: the same for every layout, order and machine. Raises ConfigError for a share outside [0, 1).

        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ConfigError(f"share of the tensors to freeze must be in [0, 1), got {share!r}")
    layers: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in named_parameters:
        layer = next((int(word) for word in name.split(".") if word.isdecimal()), None)
        if layer is not None:
            layers[_category(name, len(parameter.shape))][layer].append(name)
    frozen = []
    for category, of in layers.items():
        wanted = 0.0
        # layers in a random order, so that a random half of them rounds up
        for layer in sorted(of, key=lambda layer: _draw(seed, category, layer)):
            before, wanted = wanted, wanted + share * len(of[layer])
            count = _floor(wanted) - _floor(before)
            frozen += sorted(of[layer], key=lambda name: _draw(seed, name))[:count]
    return sorted(frozen)


def _category(name: str, dimensions: int) -> str:
    if dimensions < 2:
        return "vector"
    return "attention" if ATTENTION in name else "mlp"


def _draw(seed: int, *words: object) -> str:
    """A pseudo-random number that depends on seed and words alone, as a string of hexadecimal digits."""
    return hashlib.sha256(" ".join(map(str, (seed, *words))).encode()).hexdigest()


def _floor(value: float) -> int:
    # 0.1 * 3 + 0.1 * 7 is a hair below 1
    return math.floor(value + 1e-9)
