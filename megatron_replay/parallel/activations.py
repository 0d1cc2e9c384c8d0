"""What a micro-batch holds in memory between its forward and its backward pass, as the layers and the head are built
here; in bytes.

T tokens of the micro-batch (a tensor rank's part of them under sequence parallelism, where norms and residuals are), N
positions whose loss is computed, H hidden, V vocabulary rows here.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_replay.config import Layout
from megatron_replay.models.spec import ModelSpec
from megatron_replay.ops.full import CHUNK_ROWS

FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class Load:
    """A micro-batch at its largest."""

    tokens: int
    positions: int
    """Whose loss is computed."""
    candidates: int
    """Ids in the candidate sets of all of them."""
    micro_batches: int
    """A step has of them on one replica."""


@dataclass(frozen=True)
class Layer:
    """What the layers keep of a micro-batch for the backward pass."""

    kept: int
    """By each layer."""
    again: int
    """More of one layer at a time, where that is computed again."""


def tokens_here(layout: Layout, tokens: int) -> int:
    """Of a micro-batch's tokens those whose norms and residuals this rank has."""
    return tokens // layout.tensor if layout.sequence_parallel else tokens


def norm(spec: ModelSpec, tokens: int, itemsize: int, *, trained: bool = True) -> int:
    """Kept by a norm and the linear after it: its input in fp32, the normalised values (for its weight's gradient), its
    output."""
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
    """What autograd keeps of one layer and one micro-batch, with attention that keeps no matrix of scores.

    The fused query, key and value stay whole, for the values are a view of them. The MLP keeps the fused gate and up
    projection, silu's output, the other half and their product. `counted`: of the last layer, behind whose attention
    only so many rows go on.
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


def restricted_head(spec: ModelSpec, load: Load, itemsize: int) -> int:
    """Restricted loss, forward and backward, its gradient of the weight added in place: nothing here grows with V."""
    exact = max(itemsize, FLOAT)
    rounded = itemsize if itemsize < exact else 0
    return _states(spec, load, itemsize) + load.positions * spec.hidden_size * (exact + rounded) + 40 * load.candidates


def full_head(spec: ModelSpec, load: Load, itemsize: int, rows_here: int, *, trained: bool, cpu: bool) -> int:
    """Full loss, forward and backward: a chunk of logits, and the gradient of the weight where that is trained;
    `rows_here` is V."""
    exact = max(itemsize, FLOAT)
    low = itemsize if itemsize < exact else 0
    chunk, weight = min(load.positions, CHUNK_ROWS) * rows_here, rows_here * spec.hidden_size
    before = chunk * itemsize if load.positions > CHUNK_ROWS else 0  # is there until the next one is made
    logits = chunk * (exact + low) + before
    states = _states(spec, load, itemsize) + load.positions * spec.hidden_size * itemsize
    if not trained:
        return states + logits
    # in bf16 a chunk's product is made, and on the cpu cast, before it is added
    product = chunk * itemsize + weight * (low + (exact if low and cpu else 0))
    return states + weight * exact + max(logits, product)


def _states(spec: ModelSpec, load: Load, itemsize: int) -> int:
    """Hidden states of the positions, and the gradient of all tokens'."""
    return (load.positions + load.tokens) * spec.hidden_size * itemsize
