"""Causal attention over a flat row of samples: each token sees the earlier tokens of its own sample and nothing else.

A micro-batch is one flat row of T tokens. `segments` [n, 3] (start, length, parent; int64, on the CPU) says which
stretch is which sample. A root (parent -1) is a whole sample, or a shared prefix. Any other segment goes on from its
parent, and its tokens see all of the segments above it. Tokens of no segment are padding, whose output is zero.

The table, and the rows that count, are passed in megatron's `attention_mask` argument (see `pack`). It is the one that
reaches every layer on every megatron version, recomputation and pipeline stages included.

T tokens, Hq query heads, Hk key/value heads, D head size, L length of a segment, R sequences being generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_replay.device import fused_operator
from megatron_replay.parallel.shims.fused_arguments import causal_within, to_visible

BLOCK = 256
"""Queries of branches that are computed at a time. No mask is larger than this times the tokens of the row."""
FUSED = "npu_fusion_attention"
"""The NPU's operator, which replaces torch's where it is available."""


def import_base() -> Any:
    """megatron's module base class; imported late because the shims must come first."""
    from megatron.core.transformer.module import MegatronModule

    return MegatronModule


def pack(segments: Tensor, rows: Tensor) -> Tensor:
    """Segments [n, 3] and the rows that count [N] as one table of three columns on the cpu."""
    head = torch.tensor([[len(segments), len(rows), 0]])
    return torch.cat([head, segments, F.pad(rows, (0, -len(rows) % 3)).view(-1, 3)])


def unpack(table: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    num_segments, num_rows, _ = table[0].tolist()
    return table[1 : 1 + num_segments], table[1 + num_segments :].flatten()[:num_rows]


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float | None = None) -> Tensor:
    """Causal self-attention within each sample. query [T, Hq, D], key and value [T, Hk, D] -> [T, Hq, D]."""
    if not len(segments):
        return torch.zeros_like(query)
    roots, lengths = segments[segments[:, 2] < 0], segments[segments[:, 2] >= 0, 1].tolist()
    begin, branches = int(roots[:, 1].sum()), blocks(segments, query.device, roots=False)
    rest = query.shape[0] - begin - sum(lengths)
    # split, not sliced, because the gradient of each slice would be as long as the row
    queries = query.split([begin, *(block.visible.shape[0] for block in branches), rest])
    keys, values = (x.split([begin, *lengths, rest]) for x in (key, value))
    parts = [_causal(queries[0], keys[0], values[0], roots, scale)]
    each_key, each_value = ([*x[0].split(roots[:, 1].tolist()), *x[1:-1]] for x in (keys, values))
    for block, mine in zip(branches, queries[1:], strict=False):
        parts.append(_masked(block.visible, mine, gathered(each_key, block), gathered(each_value, block), scale))
    out = torch.cat(parts) if branches else parts[0]
    return F.pad(out, (0, 0, 0, 0, 0, rest))


def _causal(query: Tensor, key: Tensor, value: Tensor, roots: Tensor, scale: float | None) -> Tensor:
    """Causal attention within each root [n, 3]; the roots cover all tokens.

    query [L, Hq, D], key and value [L, Hk, D] -> [L, Hq, D].
    """
    fused = fused_operator(FUSED, query.device.type)
    if fused is not None:
        out: Tensor = fused(query, key, value, **causal_within(roots, query, scale))[0]
        return out
    equal = [(len(list(group)), length) for length, group in groupby(roots[:, 1].tolist())]  # neighbours: one batch
    pieces = (x.split([count * length for count, length in equal]) for x in (query, key, value))
    parts = []
    for (count, length), *mine in zip(equal, *pieces, strict=True):
        q, k, v = (x.view(count, length, *x.shape[1:]).transpose(1, 2) for x in mine)
        parts.append(
            _sdpa(q, k, v, scale=scale, is_causal=True).transpose(1, 2).reshape(count * length, *query.shape[1:])
        )
    return torch.cat(parts) if len(parts) != 1 else parts[0]


def _masked(visible: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention to the visible keys [Q, K] (bool). query [Q, Hq, D], key and value [K, Hk, D] -> [Q, Hq, D]."""
    fused = fused_operator(FUSED, query.device.type)
    if fused is not None:
        out: Tensor = fused(query[None], key[None], value[None], **to_visible(visible, query, scale))[0][0]
        return out
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    return _sdpa(q, k, v, scale=scale, attn_mask=visible)[0].transpose(0, 1)


class Block(NamedTuple):
    """Some neighbouring queries, and the keys they see."""

    queries: slice
    keys: tuple[int, ...]
    """Rows of the table of segments: those above, root first, then the queries' own and its neighbours."""
    visible: Tensor
    """[queries, keys] bool; the last keys are left out where no query sees them."""


def blocks(segments: Tensor, device: torch.device, *, roots: bool = True) -> Sequence[Block]:
    """All segments (or all but roots) in blocks of at most `BLOCK` queries.

    Neighbouring siblings share a block; a longer segment is cut. The masks lie on `device`.
    """
    return _blocks(tuple(map(tuple, segments.tolist())), device, roots)


@lru_cache(maxsize=2)  # every layer of a micro-batch asks for the same, and its masks are copied to the device once
def _blocks(table: tuple[tuple[int, int, int], ...], device: torch.device, roots: bool) -> tuple[Block, ...]:
    found = []
    for above, siblings in _families(table):
        if above or roots:
            begin, end = table[siblings[0]][0], sum(table[siblings[-1]][:2])
            for low in range(begin, end, BLOCK):
                high = min(low + BLOCK, end)
                seen = visible(
                    sum(table[i][1] for i in above), [table[i][1] for i in siblings], low - begin, high - begin
                )
                found.append(Block(slice(low, high), (*above, *siblings), seen.to(device)))
    return tuple(found)


def visible(above: int, siblings: Sequence[int], low: int, high: int) -> Tensor:
    """The mask [high - low, above + high] of queries low..high of some siblings, of these lengths.

    A query sees all tokens above, and the earlier ones of its own segment.
    """
    owner = torch.repeat_interleave(torch.arange(len(siblings)), torch.tensor(siblings))[:high]
    own = (owner[low:, None] == owner[None]).tril(low)
    return torch.cat([own.new_ones(high - low, above), own], 1)


def _families(table: Sequence[tuple[int, int, int]]) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """(segments above, neighbouring siblings): as many siblings as fit a block, or a longer one alone."""
    for parent, group in groupby(range(len(table)), key=lambda i: table[i][2]):
        above: tuple[int, ...] = ()
        while parent >= 0:
            above, parent = (parent, *above), table[parent][2]
        held: list[int] = []
        for i in group:
            if held and sum(table[i][:2]) - table[held[0]][0] > BLOCK:
                yield above, held
                held = []
            held.append(i)
        yield above, held


def gathered(each: Sequence[Tensor], block: Block) -> Tensor:
    """The keys or values that a block sees, from those of each segment."""
    return torch.cat([each[i] for i in block.keys])[: block.visible.shape[1]]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kwargs)


class Cache:
    """Keys and values of R sequences being generated: the bookkeeping that all layers use.

    `past` [R] counts the tokens each sequence already has. `rows` names the sequence of each segment of the current
    forward pass.
    """

    def __init__(self, sequences: int, capacity: int) -> None:
        self.sequences, self.capacity = sequences, capacity
        self.past = torch.zeros(sequences, dtype=torch.int64)
        self.rows: list[int] = []

    def advance(self, lengths: list[int]) -> None:
        for row, length in zip(self.rows, lengths, strict=True):
            self.past[row] += length


class LayerCache:
    """One layer's keys and values, [R, capacity, Hk, D]."""

    def __init__(self, cache: Cache, like: Tensor) -> None:
        shape = (cache.sequences, cache.capacity, *like.shape[1:])
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, cache: Cache, scale: float | None
    ) -> Tensor:
        """Store the new tokens and attend to all tokens of their sequences so far.

        A pass holds a whole prompt each, or one token each.
        """
        past = cache.past[cache.rows]
        if not past.any():
            for (start, length, _), row in zip(segments.tolist(), cache.rows, strict=True):
                self.keys[row, :length] = key[start : start + length]
                self.values[row, :length] = value[start : start + length]
            return attend(query, key, value, segments, scale)
        assert bool((segments[:, 1] == 1).all()), "after the prompt one token a sequence is generated at a time"
        n, length = len(cache.rows), int(past.max()) + 1
        rows, at = torch.tensor(cache.rows, device=key.device), past.to(key.device)
        for kept, new in ((self.keys, key), (self.values, value)):
            kept[rows, at] = new[:n]
        # while no sequence has ended the cache is taken as it lies, without a copy
        every = slice(None) if n == cache.sequences else rows
        seen = torch.arange(length)[None] <= past[:, None]
        k, v = (x[every, :length].transpose(1, 2) for x in (self.keys, self.values))
        # torch's own operator, on an NPU too, because the fused one is documented for training only
        out = _sdpa(query[:n, :, None], k, v, attn_mask=seen[:, None, None].to(query.device), scale=scale)[:, :, 0]
        return F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - n))


def segment_attention() -> type:
    """The core attention class for megatron's layer specification. It is made late, because its base is megatron's."""

    class SegmentAttention(import_base()):  # type: ignore[misc]
        """Our replacement of DotProductAttention. The top of this file says what `attention_mask` holds."""

        cache: Cache | None = None
        select_rows: Callable[[Tensor, Tensor], Tensor] | None = None
        """(output [T, 1, Hq * D], rows that count [N]) -> the rows [N^, 1, Hq * D] that the layer goes on with."""

        def __init__(
            self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any
        ) -> None:
            super().__init__(config=config)
            self.scale = softmax_scale
            self.layer: LayerCache | None = None
            self.watch: Callable[[Tensor, Tensor, Tensor, float | None], None] | None = None

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *_: Any, **__: Any
        ) -> Tensor:
            """query [T, 1, Hq, D], key and value [T, 1, Hk, D] -> [T, 1, Hq * D], or the rows `select_rows` keeps."""
            q, k, v = query[:, 0], key[:, 0], value[:, 0]
            segments, rows = unpack(attention_mask)
            if self.watch is not None and self.training and self.cache is None:
                self.watch(q, k, segments, self.scale)
            if self.cache is None:
                out = attend(q, k, v, segments, self.scale)
            else:
                self.layer = self.layer or LayerCache(self.cache, k)
                out = self.layer.attend(q, k, v, segments, self.cache, self.scale)
            out = out.reshape(query.shape[0], 1, -1)
            return out if self.select_rows is None else self.select_rows(out, rows)

        def use(self, cache: Cache | None) -> None:
            """Begin generation with a key/value cache, or end it with None."""
            self.cache, self.layer = cache, None

    return SegmentAttention
