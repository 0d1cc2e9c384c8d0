"""One megatron parameter and the Hugging Face tensors it is made of, as pure functions.

`models.weight_table` lists all parameters of a model.

One `Weight` is one parameter of megatron-core's GPTModel (local layer spec), whole: no tensor parallelism, global layer
numbers, padding included.

Letters: A query heads, G key/value heads (groups), D head size, H hidden, F ffn, V rows of the vocabulary. A hat (G^,
V^) means padded.

- linear_qkv [G^ (A/G + 2) D, H]: per group its query heads, then its key, then its value. Padded groups are zero rows
  at the end.
- linear_proj [H, G^ A/G D]: the columns of padded groups are zero, so padded heads add exactly nothing.
- linear_fc1 [2F, H]: gate rows, then up rows; a tensor-parallel rank holds its part of each half.
- embedding and output layer [V^, H]: padded rows are zero. Striped: id v lies in row (v mod 8) (V^ / 8) + v div 8. So
  the frequent (low) ids are spread over the tensor ranks, in one order for every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError, LayoutError

Axis = Literal[0, 1, "gate_up"] | None
Kind = Literal["copy", "qkv", "gate_up", "vocab", "o_proj", "rows", "columns"]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
STRIPES = 8
"""Stripes of a striped vocabulary; 1, 2, 4 and 8 tensor ranks hold whole stripes."""


@dataclass(frozen=True)
class Weight:
    """One megatron parameter and the Hugging Face tensors it is made of."""

    name: str
    """megatron name with the global layer number, e.g. decoder.layers.3.self_attention.linear_qkv.weight."""
    hf: tuple[str, ...]
    """Hugging Face tensor names, in the order of `hf_shapes`."""
    kind: Kind
    axis: Axis
    """The dimension tensor parallelism cuts: rows 0, columns 1, each half of gate_up, or None (every rank holds it)."""
    shape: tuple[int, ...]
    """Whole megatron shape, padding included."""
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int | None = None
    """Number of its layer; None: of no layer."""
    num_layers: int = 0
    """Layers of the model, where it belongs to one: checkpoints stack them."""
    groups: int = 1
    """Key/value heads in the Hugging Face tensors of a linear_qkv."""
    striped: bool = False
    """True where the rows are a striped vocabulary's."""

    @property
    def plain(self) -> tuple[int, ...]:
        """Whole megatron shape without padding."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])


def merge(weight: Weight, tensors: Mapping[str, Tensor]) -> Tensor:
    """The whole megatron tensor [weight.shape] from the Hugging Face tensors named by weight.hf, in their dtype.

    One new tensor at most; where nothing is fused or padded the Hugging Face tensor itself is returned. CheckpointError
    on another shape.
    """
    parts = [tensors[name] for name in weight.hf]
    for name, part, shape in zip(weight.hf, parts, weight.hf_shapes, strict=True):
        if tuple(part.shape) != shape:
            raise CheckpointError(f"tensor {name!r} is {list(part.shape)}, expected {list(shape)}")
    if len(parts) == 1 and weight.shape == weight.hf_shapes[0] and not weight.striped:
        return parts[0]
    whole = parts[0].new_empty(weight.shape) if weight.kind == "gate_up" else parts[0].new_zeros(weight.shape)
    if weight.striped:
        for stripe, view in enumerate(_stripe_views(weight, whole)):
            view.copy_(parts[0][stripe::STRIPES])
        return whole
    for view, part in zip(_VIEWS[weight.kind](weight, whole), parts, strict=True):
        view.copy_(part.reshape(view.shape))
    return whole


def split(weight: Weight, tensor: Tensor) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole megatron tensor, padding cut off: the exact inverse of `merge`.

    They are views where possible.
    """
    if tuple(tensor.shape) != weight.shape:
        raise CheckpointError(f"parameter {weight.name!r} is {list(tensor.shape)}, expected {list(weight.shape)}")
    if weight.striped:
        out = tensor.new_empty(weight.hf_shapes[0])
        for stripe, view in enumerate(_stripe_views(weight, tensor)):
            out[stripe::STRIPES] = view
        return {weight.hf[0]: out}
    if len(weight.hf) == 1 and weight.shape == weight.hf_shapes[0]:
        return {weight.hf[0]: tensor}
    views = _VIEWS[weight.kind](weight, tensor)
    return {name: view.reshape(shape) for name, view, shape in zip(weight.hf, views, weight.hf_shapes, strict=True)}


def shard(tensor: Tensor, axis: Axis, rank: int, size: int) -> Tensor:
    """The contiguous part of a whole tensor that tensor-parallel rank `rank` of `size` holds.

    LayoutError when the size does not divide.
    """
    if axis is None or size == 1:
        return tensor
    if axis == "gate_up":
        return torch.cat([shard(half, 0, rank, size) for half in tensor.chunk(2)])
    if tensor.shape[axis] % size:
        raise LayoutError(f"a tensor of {list(tensor.shape)} cannot be cut into {size} equal parts along axis {axis}")
    return tensor.chunk(size, axis)[rank].contiguous()


def unshard(parts: Sequence[Tensor], axis: Axis) -> Tensor:
    """The whole tensor from every rank's part, in rank order: the inverse of `shard`."""
    if axis is None or len(parts) == 1:
        return parts[0]
    if axis == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(list(parts), axis)


def restripe(tensor: Tensor, *, striped: bool) -> Tensor:
    """A whole vocabulary tensor [V^, ...] brought from the other order of rows into the order asked for, a copy."""
    rows = tensor.shape[0]
    cut = (rows // STRIPES, STRIPES) if striped else (STRIPES, rows // STRIPES)
    return tensor.reshape(*cut, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def half_split_rows(weight: Tensor, num_heads: int) -> Tensor:
    """Query or key rows [num_heads * D, H] from interleaved to half-split rotary pairs.

    The pairs (0 1)(2 3).. become (0 D/2)(1 D/2+1)... llama2.c and llama.cpp rotate neighbouring rows, Hugging Face and
    megatron-core rotate row i with row i + D/2. D is the head size.
    """
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _qkv_views(weight: Weight, whole: Tensor) -> list[Tensor]:
    """Views of the query, key and value rows inside linear_qkv, real groups only.

    They are [G, A/G D, ...], [G, D, ...] and [G, D, ...].
    """
    query, dim, _ = (shape[0] // weight.groups for shape in weight.hf_shapes)
    groups = whole.view(-1, query + 2 * dim, *whole.shape[1:])[: weight.groups]
    return [groups[:, :query], groups[:, query : query + dim], groups[:, query + dim :]]


def _column_views(weight: Weight, whole: Tensor) -> list[Tensor]:
    """The first columns: those of the heads that are no padding."""
    return [whole[:, : weight.hf_shapes[0][1]]]


def _row_views(weight: Weight, whole: Tensor) -> list[Tensor]:
    """Consecutive rows, one block for each Hugging Face tensor (gate and up, or the vocabulary without its padding)."""
    rows = [shape[0] for shape in weight.hf_shapes]
    return list(torch.split(whole[: sum(rows)], rows))


def _stripe_views(weight: Weight, whole: Tensor) -> list[Tensor]:
    """The real rows of each stripe s: those of the ids s, s + 8, s + 16, ..."""
    vocab = weight.hf_shapes[0][0]
    return [part[: len(range(stripe, vocab, STRIPES))] for stripe, part in enumerate(whole.chunk(STRIPES))]


_VIEWS: dict[str, Callable[[Weight, Tensor], list[Tensor]]] = {
    "qkv": _qkv_views,
    "o_proj": _column_views,
    "gate_up": _row_views,
    "vocab": _row_views,
    "rows": _row_views,
    "columns": _column_views,
}
