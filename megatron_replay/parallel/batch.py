"""A micro-batch as the pipeline sees it: one flat row of tokens, what stretch is which sample, and the positions whose
loss counts.

T tokens in the flat row (the same for every micro-batch of a step, so that pipeline stages know what they receive), N
positions that count.
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
    """[n, 3] int64 on the cpu: start, length and parent, see `data.prefixes`; without shared prefixes a row for each
    sample."""
    rows: Tensor
    """[N] int64, on the cpu: the flat positions whose hidden state goes to the head, sample by sample; in a shared
    prefix once for each."""
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
    """Lay token id sequences in a row of `length`, as `tree` says (default: one after the other); positions[i] are
    those of sample i whose next token is predicted."""
    tree = lay(samples, share_prefixes=False) if tree is None else tree
    tokens = np.zeros(length, dtype=np.int64)
    places = np.zeros(length, dtype=np.int64)
    tokens[: len(tree)] = tree.tokens
    places[: len(tree)] = tree.position_ids
    rows, gold = [], []
    for ids, chosen, where in zip(samples, positions, tree.where, strict=True):
        rows.append(where[np.asarray(chosen, dtype=np.int64)])
        gold.append(np.asarray(ids, dtype=np.int64)[np.asarray(chosen, dtype=np.int64) + 1])
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(device),
        places=torch.from_numpy(places)[None].to(device),
        segments=torch.from_numpy(tree.segments),
        rows=torch.from_numpy(_joined(rows)),
        gold=torch.from_numpy(_joined(gold)).to(device),
        notes=notes or {},
    )


def micro_batches(
    samples: Sequence[Sequence[np.ndarray]],
    positions: Sequence[Sequence[np.ndarray]],
    notes: Sequence[dict[str, Any]],
    device: torch.device,
    *,
    multiple: int,
    share: bool,
) -> list[MicroBatch]:
    """The micro-batches of a step, all of one length so that pipeline stages know what they receive: samples[m] and
    positions[m] of the m-th. Samples that begin alike are a tree where `share` says so; notes["shared"] counts the
    tokens that it saves.

    A sample ends at its last position: nothing that counts depends on what follows, so that is left out.
    """
    needed = [[cut(ids, at) for ids, at in zip(*pair, strict=True)] for pair in zip(samples, positions, strict=True)]
    trees = [lay(some, share_prefixes=share) for some in needed]
    length = row_length([len(tree) for tree in trees], multiple)
    return [
        flatten(whole, at, length, device, {"shared": sum(map(len, some)) - len(tree), **noted}, tree)
        for whole, at, noted, some, tree in zip(samples, positions, notes, needed, trees, strict=True)
    ]


def cut(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The tokens on which what is predicted after `positions` depends."""
    return ids[: int(positions.max(initial=-1)) + 1]


def row_length(lengths: Sequence[int], multiple: int) -> int:
    """The longest of some flat rows, at least 1, rounded up so that sequence parallelism divides it."""
    return -(-max(1, *lengths) // multiple) * multiple


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
