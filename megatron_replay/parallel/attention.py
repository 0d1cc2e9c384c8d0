"""Causal attention over a flat row of samples: each token sees the earlier tokens of its own sample and nothing else.

A micro-batch is one flat row of T tokens; `segments` [n, 2] (start, length; int64, on the cpu) says which stretch is which sample. It
travels in
megatron's `attention_mask` argument, the one that reaches every layer on every megatron version, recomputation and pipeline stages
included.
Tokens of no segment are padding: their output is zero.

T tokens, Hq query heads, Hk key/value heads, D head size, L length of a segment, R sequences being generated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_replay.device import fused_operator
from megatron_replay.parallel.fused import causal_within


def import_base() -> Any:
    """megatron's module base class; imported late because the shims must come first."""
    from megatron.core.transformer.module import MegatronModule

    return MegatronModule


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scale: float | None = None) -> Tensor:
    """Causal self-attention within each segment. query [T, Hq, D], key and value [T, Hk, D] -> [T, Hq, D]."""
    fused = fused_operator("npu_fusion_attention", query.device.type)
    if fused is not None and len(segments):
        end = int(segments[-1].sum())
        out = fused(query[:end], key[:end], value[:end], **causal_within(segments, query, scale))[0]
        return F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - end))
    parts = []
    end = 0
    for start, count, length in runs(segments):
        assert start == end, "segments must follow each other"
        end = start + count * length
        q, k, v = (x[start:end].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        parts.append(_sdpa(q, k, v, scale=scale, is_causal=True).transpose(1, 2).reshape(end - start, *query.shape[1:]))
    out = torch.cat(parts) if len(parts) != 1 else parts[0]
    return F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - end))


def runs(segments: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, count, length) of neighbouring segments of equal length: they are computed as one batch."""
    for length, group in groupby(segments.tolist(), key=lambda row: row[1]):
        rows = list(group)
        yield rows[0][0], len(rows), length


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kwargs)


class Cache:
    """Keys and values of R sequences being generated, shared bookkeeping of all layers.

    `past` [R] counts the tokens each sequence already has; `rows` names the sequence of each segment of the current forward pass.
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

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, cache: Cache, scale: float | None) -> Tensor:
        """Store the new tokens and attend to all of their sequences' tokens so far; a pass is a whole prompt each, or one token each."""
        past = cache.past[cache.rows]
        for (start, length), row, seen in zip(segments.tolist(), cache.rows, past.tolist(), strict=True):
            self.keys[row, seen : seen + length] = key[start : start + length]
            self.values[row, seen : seen + length] = value[start : start + length]
        if not past.any():
            return attend(query, key, value, segments, scale)
        assert bool((segments[:, 1] == 1).all()), "after the prompt one token a sequence is generated at a time"
        length = int(past.max()) + 1
        seen = torch.arange(length)[None] <= past[:, None]
        k, v = (x[cache.rows, :length].transpose(1, 2) for x in (self.keys, self.values))
        n = len(cache.rows)
        out = _sdpa(query[:n, :, None], k, v, attn_mask=seen[:, None, None].to(query.device), scale=scale)[:, :, 0]
        return F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - n))


def segment_attention() -> type:
    """The core attention for megatron's layer specification (a class built late: its base is megatron's)."""

    class SegmentAttention(import_base()):  # type: ignore[misc]
        """Stands where DotProductAttention stands; see the top of this file for what `attention_mask` holds."""

        cache: Cache | None = None

        def __init__(self, config: Any, layer_number: int, *_: Any, softmax_scale: float | None = None, **__: Any) -> None:
            super().__init__(config=config)
            self.scale = softmax_scale
            self.layer: LayerCache | None = None
            self.watch: Callable[[Tensor, Tensor, Tensor, float | None], None] | None = None

        def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> Tensor:
            """query [T, 1, Hq, D], key and value [T, 1, Hk, D] -> [T, 1, Hq * D]."""
            q, k, v = query[:, 0], key[:, 0], value[:, 0]
            if self.watch is not None and self.training and self.cache is None:
                self.watch(q, k, attention_mask, self.scale)
            if self.cache is None:
                out = attend(q, k, v, attention_mask, self.scale)
            else:
                self.layer = self.layer or LayerCache(self.cache, k)
                out = self.layer.attend(q, k, v, attention_mask, self.cache, self.scale)
            return out.reshape(query.shape[0], 1, -1)

        def use(self, cache: Cache | None) -> None:
            """Begin (or with None end) generation with a key/value cache."""
            self.cache, self.layer = cache, None

    return SegmentAttention
