"""A micro-batch as the pipeline sees it: one flat row of tokens, what stretch is which sample, and the positions whose loss counts.

T tokens in the flat row (the same for every micro-batch of a step, so that pipeline stages know what they receive), N positions that count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor
    """[1, T] int64."""
    places: Tensor
    """[1, T] int64: each token's position within its sample."""
    segments: Tensor
    """[n, 2] int64 on the cpu: start and length of each sample."""
    rows: Tensor
    """[N] int64: the flat positions whose hidden state goes to the head."""
    gold: Tensor
    """[N] int64: the token that follows each of them."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What the head's task wants besides: candidate sets, sample uids."""


def flatten(
    samples: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    length: int,
    device: torch.device,
    notes: dict[str, Any] | None = None,
) -> MicroBatch:
    """Lay token id sequences one after the other in a row of `length`; positions[i] are those of sample i whose next token is predicted."""
    tokens = np.zeros(length, dtype=np.int64)
    places = np.zeros(length, dtype=np.int64)
    segments, rows, gold = [], [], []
    start = 0
    for ids, chosen in zip(samples, positions, strict=True):
        tokens[start : start + len(ids)] = ids
        places[start : start + len(ids)] = np.arange(len(ids))
        segments.append((start, len(ids)))
        rows.append(np.asarray(chosen, dtype=np.int64) + start)
        gold.append(np.asarray(ids, dtype=np.int64)[np.asarray(chosen, dtype=np.int64) + 1])
        start += len(ids)
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(device),
        places=torch.from_numpy(places)[None].to(device),
        segments=torch.tensor(segments, dtype=torch.int64).reshape(-1, 2),
        rows=torch.from_numpy(_joined(rows)).to(device),
        gold=torch.from_numpy(_joined(gold)).to(device),
        notes=notes or {},
    )


def row_length(lengths: Sequence[int], multiple: int) -> int:
    """The longest of some flat rows, rounded up so that sequence parallelism divides it."""
    return -(-max(lengths, default=1) // multiple) * multiple


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
