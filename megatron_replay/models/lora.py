"""LoRA adapters as data (arXiv 2106.09685).

These are the factors a model gets, how they lie on the ranks, where they start, and how they merge.

Beside a matrix W [out, in] stand A [r, in] and B [out, r]. The layer computes y = W x + (alpha / r) B A x. Tensor
parallelism cuts the factors like their matrix:
- by rows (linear_qkv, linear_fc1): every rank holds A and its rows of B;
- by columns (linear_proj, linear_fc2): every rank holds its columns of A, and B.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_replay.config import Adapter
from megatron_replay.errors import ConfigError
from megatron_replay.models.weights import Axis, Kind, Weight

A, B = "lora_a", "lora_b"
"""Last words of the factors' names, where the matrix's own is `weight`."""


def factors(weights: Iterable[Weight], adapter: Adapter) -> list[Weight]:
    """A and B of every adapted matrix, in the model's order.

    `hf` is their own name, for Hugging Face folders hold them merged. The zero rows and columns of padded heads are no
    part of the factors: B has none of their rows, A none of their columns.
    """
    found = []
    for weight in weights:
        if _adapted(weight, adapter):
            rows, columns = weight.plain
            by_rows = weight.axis != 1
            shape_a, shape_b = (adapter.rank, weight.shape[1]), (weight.shape[0], adapter.rank)
            found.append(_factor(weight, A, "columns", None if by_rows else 1, shape_a, (adapter.rank, columns)))
            found.append(_factor(weight, B, "rows", weight.axis if by_rows else None, shape_b, (rows, adapter.rank)))
    return found


def check(adapter: Adapter, weights: Iterable[Weight]) -> None:
    """Raise ConfigError for a rank that no product B A can have: above the rows or columns of an adapted matrix."""
    for weight in weights:
        if _adapted(weight, adapter) and adapter.rank > min(weight.plain):
            raise ConfigError(
                f"adapter.rank={adapter.rank} is too large: {_target(weight)} is {list(weight.plain)}; "
                f"give at most {min(weight.plain)} (8 to 64 is usual), or train the matrices themselves with "
                "adapter.rank=0"
            )


def scale(adapter: Adapter) -> float:
    """The factor of B A."""
    return adapter.alpha / adapter.rank


def initial(factor: Weight, seed: int) -> Tensor:
    """The values with which a factor starts, whole and without padding, fp32.

    B is zero, A uniform in +-1/sqrt(in) (Kaiming, a = sqrt 5, as the paper's code). The values depend on the name and
    the seed alone, so every layout starts from the same numbers.
    """
    (shape,) = factor.hf_shapes
    if factor.name.endswith(B):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {factor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


def merged(weight: Tensor, a: Tensor, b: Tensor, adapter: Adapter) -> Tensor:
    """W + (alpha / r) B A, computed in fp32 (fp64 for fp64) and rounded once to W's dtype: [out, in], a new tensor.

    It serves one rank's parts too, where B's rows or A's columns are cut like W's.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(exact, copy=True).addmm_(b.to(exact), a.to(exact), alpha=scale(adapter)).to(weight.dtype)


def beside(weight: Weight) -> tuple[str, str]:
    """Names of the factors that an adapted matrix has."""
    stem = weight.name.removesuffix("weight")
    return stem + A, stem + B


def _adapted(weight: Weight, adapter: Adapter) -> bool:
    return weight.layer is not None and len(weight.shape) == 2 and _target(weight) in adapter.targets


def _target(weight: Weight) -> str:
    return weight.name.split(".")[-2]


def _factor(of: Weight, word: str, kind: Kind, axis: Axis, shape: tuple[int, int], plain: tuple[int, int]) -> Weight:
    name = of.name.removesuffix("weight") + word
    kind = "copy" if shape == plain else kind
    return Weight(name, (name,), kind, axis, shape, (plain,), layer=of.layer, num_layers=of.num_layers)
