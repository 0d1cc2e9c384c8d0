"""Evaluation of a sharded model: log-probabilities of given tokens, and rows of sequences for it.

Sequences are dealt out over the data-parallel replicas; every rank gets every result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from torch import Tensor

from megatron_replay.data import prefixes
from megatron_replay.ops import linear_cross_entropy
from megatron_replay.parallel.batch import MicroBatch, micro_batches
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks.world import World
from megatron_replay.parallel.sampling import argmax

T = TypeVar("T")
Progress = Callable[[int], None]


def token_nll(
    model: Model,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    *,
    vocab_size: int,
    row_tokens: int,
    share_prefixes: bool = False,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Negative log-likelihood (nats, fp32) of the token after each of the given positions of each sequence.

    - vocab_size: the real vocabulary.
    - row_tokens: sequences are laid together up to this many tokens a forward pass.
    - share_prefixes: lay sequences that begin alike as a tree.
    """
    shard = vocab_shard(model)

    def task(batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, batch.gold, shard, vocab_size=vocab_size)

    return _each_position(model, sequences, positions, task, row_tokens, share_prefixes, progress)


def token_is_greedy(
    model: Model,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    *,
    vocab_size: int,
    row_tokens: int,
    share_prefixes: bool = False,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """1.0 where the token after a position is the likeliest one, as in `generate`, else 0.0; arguments of `token_nll`.

    The logits [positions of a row, V / tensor ranks] exist at once: for a few positions each, such as short answers.
    """
    shard = vocab_shard(model)

    def task(batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        return argmax(hidden, weight, shard, vocab_size) == batch.gold

    return _each_position(model, sequences, positions, task, row_tokens, share_prefixes, progress)


def _each_position(
    model: Model,
    sequences: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    task: Callable[[MicroBatch, Tensor, Tensor], Tensor],
    row_tokens: int,
    share_prefixes: bool,
    progress: Progress | None,
) -> list[np.ndarray]:
    """The task's values [positions], fp32, of each sequence, on every rank."""
    world = model.world
    dealt = deal(sequences, row_tokens, world, share_prefixes=share_prefixes)
    values: list[np.ndarray] = []
    for rows in in_groups(dealt, 2 * world.pipeline_size):
        ids, wanted = ([[some[i] for i in row] for row in rows] for some in (sequences, positions))
        batches = micro_batches(
            ids, wanted, world.torch_device, multiple=world.tensor_size, share_prefixes=share_prefixes
        )
        forward(model, batches, task, consume=lambda _, out: values.append(out.float().cpu().numpy()))
        if progress is not None:
            progress(sum(len(row) for row in rows) * world.data_size)
    found: dict[int, np.ndarray] = {}
    for row, out in zip(dealt, values, strict=model.head is not None):  # before the last stage there are no values
        cuts = np.cumsum([len(positions[i]) for i in row])[:-1]
        found.update(zip(row, np.split(out, cuts), strict=True))
    everyone: dict[int, np.ndarray] = {}
    for part in world.gather_objects(found if world.speaks else {}):
        everyone.update(part)
    return [everyone[i] for i in range(len(sequences))]


def deal(sequences: Sequence[np.ndarray], row_tokens: int, world: World, *, share_prefixes: bool) -> list[list[int]]:
    """This replica's rows for a single pass over all sequences.

    They hold every `data_size`-th sequence, neighbours laid together up to `row_tokens`.

    share_prefixes: instead, this replica takes a stretch of the sequences ordered by prefix. So most of those that
    begin alike meet in a row.
    """
    if not share_prefixes:
        return fill(range(world.data_rank, len(sequences), world.data_size), [len(s) for s in sequences], row_tokens)
    ordered = prefixes.forest(sequences).order(range(len(sequences)))
    first, last = (len(ordered) * rank // world.data_size for rank in (world.data_rank, world.data_rank + 1))
    return prefixes.rows(sequences, ordered[first:last], row_tokens)


def fill(indices: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Lay neighbouring sequences together into rows of at most `row_tokens` tokens (a longer one alone)."""
    rows: list[list[int]] = []
    held = 0
    for index in indices:
        if rows and held + lengths[index] <= row_tokens:
            rows[-1].append(index)
            held += lengths[index]
        else:
            rows.append([index])
            held = lengths[index]
    return rows


def in_groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
