"""Memory of a micro-batch between its forward and its backward pass, in bytes, as the layers are built here.

The head's memory is that of its loss, see `parallel.losses`.

T tokens of the micro-batch, N positions whose loss is computed, H hidden. Under sequence parallelism norms and
residuals have a tensor rank's part of the T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_replay.config import Layout
from megatron_replay.models.spec import ModelSpec

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class LargestMicroBatch:
    """Sizes that no micro-batch of a run exceeds."""

    tokens: int
    positions: int
    """The positions whose loss is computed."""
    candidates: int
    """Ids in the candidate sets of all of these positions."""
    micro_batches: int
    """Micro-batches in a step of one replica."""


@dataclass(frozen=True)
class Layer:
    """Bytes that a layer keeps of a micro-batch for the backward pass."""

    kept: int
    recomputed: int
    """Extra bytes of the layer that is being recomputed; there is one at a time."""


def tokens_here(layout: Layout, tokens: int) -> int:
    """The number of a micro-batch's tokens that have their norms and residuals on this rank."""
    return tokens // layout.tensor if layout.sequence_parallel else tokens


def norm(spec: ModelSpec, tokens: int, itemsize: int, *, trained: bool = True) -> int:
    """Bytes kept by a norm and the linear after it.

    They are the norm's input in fp32, the normalised values (for its weight's gradient), and its output.
    """
    exact = max(itemsize, FLOAT)
    return tokens * (spec.hidden_size * (exact + itemsize + trained * itemsize) + exact)


def layer(
    spec: ModelSpec,
    layout: Layout,
    tokens: int,
    itemsize: int,
    *,
    counted: int | None = None,
    norms_trained: bool = True,
) -> Layer:
    """The memory that autograd keeps of one layer and one micro-batch, with attention that keeps no matrix of scores.

    The fused query, key and value stay whole, for the values are a view of them. The MLP keeps the fused gate and up
    projection, silu's output, the other half and their product.

    counted: the rows that go on behind the attention of the last layer; None for other layers.
    """
    rows = tokens if counted is None else counted
    here, behind = tokens_here(layout, tokens), tokens_here(layout, rows)
    heads, groups = (count // layout.tensor for count in spec.padded_heads(layout.head_multiple))
    query, key, ffn = heads * spec.head_dim, groups * spec.head_dim, spec.ffn_size // layout.tensor
    exact = max(itemsize, FLOAT)
    fused = tokens * (query + 2 * key) * itemsize
    rotary = tokens * (query + key + 4 * spec.head_dim) * itemsize
    normed = 0
    if spec.qk_norm:
        normed = tokens * ((query + key) * (exact + norms_trained * itemsize) + (heads + groups) * exact)
        # the fp32 input of the keys' norm is the fused tensor itself; that of the queries, where that is a view
        if itemsize == exact:
            normed -= tokens * (key + (query if groups in (1, heads) else 0)) * itemsize
    core = tokens * (query * itemsize + heads * FLOAT)
    mlp = 5 * rows * ffn * itemsize
    index = 0 if counted is None else 8 * rows
    norms = norm(spec, here, itemsize, trained=norms_trained) + norm(spec, behind, itemsize, trained=norms_trained)
    whole = norms + fused + rotary + normed + core + rows * query * itemsize + mlp + index
    if layout.recompute == "full":
        return Layer(here * spec.hidden_size * itemsize, whole)
    return Layer(whole - core, core) if layout.recompute == "selective" else Layer(whole, 0)


def head_states(spec: ModelSpec, largest: LargestMicroBatch, itemsize: int) -> int:
    """Hidden states of the positions at the head, and the gradient of all tokens' hidden states."""
    return (largest.positions + largest.tokens) * spec.hidden_size * itemsize
