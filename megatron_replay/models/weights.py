"""The name and layout table between Hugging Face tensors and megatron-core's GPTModel (local layer spec), as pure
functions.

One `Weight` is one megatron parameter, whole: no tensor parallelism, global layer numbers, padding included. Letters: A
query heads, G key/value heads (groups), D head size, H hidden, F ffn, V vocabulary rows; a hat (G^, V^) means padded.

- linear_qkv [G^ (A/G + 2) D, H]: per group its query heads, then its key, then its value; padded groups are zero rows
  at the end.
- linear_proj [H, G^ A/G D]: the columns of padded groups are zero, so padded heads add exactly nothing.
- linear_fc1 [2F, H]: gate rows, then up rows; a tensor-parallel rank holds its part of each half.
- embedding and output layer [V^, H]: padded rows are zero. Striped: id v lies in row (v mod 8) (V^ / 8) + v div 8, so
  that the frequent (low) ids are spread over the tensor ranks; one order for every layout.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError, LayoutError
from megatron_replay.models.spec import ModelSpec

Axis = Literal[0, 1, "gate_up"] | None
Kind = Literal["copy", "qkv", "gate_up", "vocab", "o_proj", "rows", "columns"]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
STRIPES = 8
"""Of a striped vocabulary; 1, 2, 4 and 8 tensor ranks hold whole stripes."""


@dataclass(frozen=True)
class Weight:
    """One megatron parameter and the Hugging Face tensors it is made of."""

    name: str
    """megatron name with the global layer number, e.g. decoder.layers.3.self_attention.linear_qkv.weight."""
    hf: tuple[str, ...]
    """Hugging Face tensor names, in the order of `hf_shapes`."""
    kind: Kind
    axis: Axis
    """What tensor parallelism cuts: None (every rank holds it), rows 0, columns 1, or both halves of gate_up."""
    shape: tuple[int, ...]
    """Whole megatron shape, padding included."""
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int | None = None
    striped: bool = False
    """Whether the rows are a striped vocabulary's."""


def weights(spec: ModelSpec, *, head_multiple: int = 1, striped: bool = False) -> list[Weight]:
    """Every distinct parameter, in the model's order; a tied output layer is not listed, it is the embedding (see
    `weight_of`)."""
    hidden, vocab = spec.hidden_size, spec.vocab_size
    shape = (spec.padded_vocab(), hidden)
    table = [Weight(EMBEDDING, ("model.embed_tokens.weight",), "vocab", 0, shape, ((vocab, hidden),), striped=striped)]
    for layer in range(spec.num_layers):
        table += _layer(spec, layer, head_multiple)
    table.append(_norm("decoder.final_layernorm.weight", "model.norm.weight", hidden))
    if not spec.tied:
        table.append(Weight(OUTPUT, ("lm_head.weight",), "vocab", 0, shape, ((vocab, hidden),), striped=striped))
    return table


def weight_of(spec: ModelSpec, name: str, *, head_multiple: int = 1, striped: bool = False) -> Weight:
    """The Weight of a megatron parameter; a tied model's `output_layer.weight` (a last stage holds a copy) is the
    embedding.

    Raises CheckpointError for a name the model does not have.
    """
    table = _by_name(spec, head_multiple, striped)
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CheckpointError(f"{spec.architecture} with {spec.num_layers} layers has no parameter {name!r}{hint}")
    return table[name]


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model with its shape, in the model's order."""
    return {name: shape for weight in weights(spec) for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)}


def merge(weight: Weight, tensors: Mapping[str, Tensor], spec: ModelSpec) -> Tensor:
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
    for view, part in zip(_VIEWS[weight.kind](weight, whole, spec), parts, strict=True):
        view.copy_(part.reshape(view.shape))
    return whole


def split(weight: Weight, tensor: Tensor, spec: ModelSpec) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole megatron tensor, padding cut off: the exact inverse of `merge`. Views where
    possible."""
    if tuple(tensor.shape) != weight.shape:
        raise CheckpointError(f"parameter {weight.name!r} is {list(tensor.shape)}, expected {list(weight.shape)}")
    if weight.striped:
        out = tensor.new_empty(weight.hf_shapes[0])
        for stripe, view in enumerate(_stripe_views(weight, tensor)):
            out[stripe::STRIPES] = view
        return {weight.hf[0]: out}
    if len(weight.hf) == 1 and weight.shape == weight.hf_shapes[0]:
        return {weight.hf[0]: tensor}
    views = _VIEWS[weight.kind](weight, tensor, spec)
    return {name: view.reshape(shape) for name, view, shape in zip(weight.hf, views, weight.hf_shapes, strict=True)}


def shard(tensor: Tensor, axis: Axis, rank: int, size: int) -> Tensor:
    """The contiguous part of a whole tensor that tensor-parallel rank `rank` of `size` holds; LayoutError when it does
    not divide."""
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
    """Query or key rows [num_heads * D, H] from interleaved rotary pairs (0 1)(2 3).. to half-split pairs (0 D/2)(1
    D/2+1)...

    llama2.c and llama.cpp rotate neighbouring rows, Hugging Face and megatron-core rotate row i with row i + D/2. D is
    the head size.
    """
    rows, width = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


@lru_cache(maxsize=8)
def _by_name(spec: ModelSpec, head_multiple: int, striped: bool) -> dict[str, Weight]:
    table = {weight.name: weight for weight in weights(spec, head_multiple=head_multiple, striped=striped)}
    return {OUTPUT: table[EMBEDDING], **table}


def _layer(spec: ModelSpec, layer: int, head_multiple: int) -> list[Weight]:
    """The parameters of one decoder layer (pre-norm attention, pre-norm gated MLP)."""
    to, of = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, ffn, dim = spec.hidden_size, spec.ffn_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    heads, groups = spec.padded_heads(head_multiple)
    names = tuple(f"{of}self_attn.{x}_proj.weight" for x in "qkv")
    qkv_shapes = ((q, hidden), (kv, hidden), (kv, hidden))
    table = [_norm(f"{to}input_layernorm.weight", f"{of}input_layernorm.weight", hidden, layer)]
    table.append(
        Weight(
            f"{to}self_attention.linear_qkv.weight",
            names,
            "qkv",
            0,
            ((heads + 2 * groups) * dim, hidden),
            qkv_shapes,
            layer,
        )
    )
    if spec.qk_norm:
        table += [
            _norm(f"{to}self_attention.{x}_layernorm.weight", f"{of}self_attn.{x}_norm.weight", dim, layer)
            for x in "qk"
        ]
    proj, o_proj = f"{to}self_attention.linear_proj.weight", f"{of}self_attn.o_proj.weight"
    table.append(Weight(proj, (o_proj,), "o_proj", 1, (hidden, heads * dim), ((hidden, q),), layer))
    table.append(_norm(f"{to}pre_mlp_layernorm.weight", f"{of}post_attention_layernorm.weight", hidden, layer))
    halves = (f"{of}mlp.gate_proj.weight", f"{of}mlp.up_proj.weight")
    table.append(
        Weight(
            f"{to}mlp.linear_fc1.weight", halves, "gate_up", "gate_up", (2 * ffn, hidden), ((ffn, hidden),) * 2, layer
        )
    )
    down = (f"{of}mlp.down_proj.weight",)
    table.append(Weight(f"{to}mlp.linear_fc2.weight", down, "copy", 1, (hidden, ffn), ((hidden, ffn),), layer))
    return table


def _norm(name: str, hf: str, size: int, layer: int | None = None) -> Weight:
    return Weight(name, (hf,), "copy", None, (size,), ((size,),), layer)


def _qkv_views(weight: Weight, whole: Tensor, spec: ModelSpec) -> list[Tensor]:
    """Views [G, A/G D, H], [G, D, H], [G, D, H] of the query, key and value rows inside linear_qkv, real groups
    only."""
    dim = spec.head_dim
    query = spec.heads_per_group * dim
    groups = whole.view(-1, query + 2 * dim, spec.hidden_size)[: spec.num_kv_heads]
    return [groups[:, :query], groups[:, query : query + dim], groups[:, query + dim :]]


def _column_views(weight: Weight, whole: Tensor, spec: ModelSpec) -> list[Tensor]:
    """The first columns: those of the heads that are no padding."""
    return [whole[:, : weight.hf_shapes[0][1]]]


def _row_views(weight: Weight, whole: Tensor, spec: ModelSpec) -> list[Tensor]:
    """Consecutive rows, one block for each Hugging Face tensor (gate and up, or the vocabulary without its padding)."""
    rows = [shape[0] for shape in weight.hf_shapes]
    return list(torch.split(whole[: sum(rows)], rows))


def _stripe_views(weight: Weight, whole: Tensor) -> list[Tensor]:
    """The real rows of each stripe s: those of the ids s, s + 8, s + 16, ..."""
    vocab = weight.hf_shapes[0][0]
    return [part[: len(range(stripe, vocab, STRIPES))] for stripe, part in enumerate(whole.chunk(STRIPES))]


_VIEWS: dict[str, Callable[[Weight, Tensor, ModelSpec], list[Tensor]]] = {
    "qkv": _qkv_views,
    "o_proj": _column_views,
    "gate_up": _row_views,
    "vocab": _row_views,
    "rows": _row_views,
    "columns": _column_views,
}
