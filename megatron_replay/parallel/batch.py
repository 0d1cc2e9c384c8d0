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

from megatron_replay.data.prefixes import Tree, lay


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor
    """[1, T] int64."""
    places: Tensor
    """[1, T] int64: each token's position within its sample."""
    segments: Tensor
    """[n, 3] int64 on the cpu: start, length and parent, see `data.prefixes`; without shared prefixes a row for each sample."""
    rows: Tensor
    """[N] int64: the flat positions whose hidden state goes to the head, sample by sample; those in a shared prefix once for each."""
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
    tree: Tree | None = None,
) -> MicroBatch:
    """Lay token id sequences in a row of `length`, as `tree` says (default: one after the other); positions[i] are those of sample i whose
    next token is predicted."""
    tree = lay(samples, share=False) if tree is None else tree
    tokens = np.zeros(length, dtype=np.int64)
    places = np.zeros(length, dtype=np.int64)
    tokens[: len(tree)] = tree.tokens
    places[: len(tree)] = tree.places
    rows, gold = [], []
    for ids, chosen, where in zip(samples, positions, tree.where, strict=True):
        rows.append(where[np.asarray(chosen, dtype=np.int64)])
        gold.append(np.asarray(ids, dtype=np.int64)[np.asarray(chosen, dtype=np.int64) + 1])
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(device),
        places=torch.from_numpy(places)[None].to(device),
        segments=torch.from_numpy(tree.segments),
        rows=torch.from_numpy(_joined(rows)).to(device),
        gold=torch.from_numpy(_joined(gold)).to(device),
        notes=notes or {},
    )


def row_length(lengths: Sequence[int], multiple: int) -> int:
    """The longest of some flat rows, rounded up so that sequence parallelism divides it."""
    return -(-max(lengths, default=1) // multiple) * multiple


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
