"""Evaluation of a sharded model: log-probabilities of given tokens, and continuations.

Sequences are dealt out over the data-parallel replicas; every rank gets every result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.data import prefixes
from megatron_replay.ops import VocabShard, linear_cross_entropy
from megatron_replay.parallel.batch import MicroBatch, Task, flatten, micro_batches, row_length
from megatron_replay.parallel.mcore.attention import Cache
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks.world import World
from megatron_replay.parallel.sampling import Sampling

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
        return _argmax(hidden, weight, shard, vocab_size) == batch.gold

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


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    batch: int,
    sampling: Sampling | None = None,
    keep_stop: bool = False,
    ended: Callable[[list[int]], bool] | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continuations, with a key/value cache, `batch` prompts at a time.

    They are without the prompt. A stop id ends one and is left out, unless `keep_stop`. `ended` is asked after every
    token whether the continuation so far is complete; its last token stays. They are greedy without `sampling`.
    """
    world = model.world
    mine = range(world.data_rank, len(prompts), world.data_size)
    found: dict[int, list[int]] = {}
    for chunk in in_groups(list(mine), batch):
        request = _Request(max_new_tokens, set(stop_ids), vocab_size, sampling, keep_stop, ended or (lambda _: False))
        answers = _continue(model, chunk, [prompts[i] for i in chunk], request)
        found.update(zip(chunk, answers, strict=True))
        if progress is not None:
            progress(len(chunk) * world.data_size)
    everyone: dict[int, list[int]] = {}
    for part in world.gather_objects(found):
        everyone.update(part)
    return [everyone[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Request:
    max_new: int
    stops: set[int]
    vocab_size: int
    sampling: Sampling | None
    keep_stop: bool
    ended: Callable[[list[int]], bool]


def _continue(model: Model, numbers: Sequence[int], prompts: list[Sequence[int]], request: _Request) -> list[list[int]]:
    """The continuations of the prompts with these numbers, by which each has draws of its own."""
    out: list[list[int]] = [[] for _ in prompts]
    cache = Cache(len(prompts), max(map(len, prompts)) + request.max_new)
    model.use_cache(cache)
    try:
        alive = list(range(len(prompts)))
        feed = [list(prompt) for prompt in prompts]
        while alive and (length := len(out[alive[0]])) < request.max_new:
            cache.rows = alive
            pick = _picker(model, request, [numbers[row] for row in alive], length)
            following = _next_tokens(model, feed, cache, pick)
            cache.advance([len(tokens) for tokens in feed])
            for row, token in zip(alive, following, strict=True):
                if token not in request.stops or request.keep_stop:
                    out[row].append(token)
            kept = [(row, token) for row, token in zip(alive, following, strict=True) if token not in request.stops]
            kept = [(row, token) for row, token in kept if not request.ended(out[row])]
            alive, feed = [row for row, _ in kept], [[token] for _, token in kept]
    finally:
        model.use_cache(None)
    return out


def _picker(model: Model, request: _Request, numbers: Sequence[int], length: int) -> Task:
    """The task that picks token number `length` of each of the texts `numbers`."""
    shard, size, sampling = vocab_shard(model), request.vocab_size, request.sampling
    if sampling is None:
        return lambda _, hidden, weight: _argmax(hidden, weight, shard, size)

    def draw(_: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        noise = sampling.noise(numbers, length, size)
        return _argmax(hidden, weight, shard, size, noise.to(hidden.device), sampling.temperature)

    return draw


def _next_tokens(model: Model, feed: list[list[int]], cache: Cache, pick: Task) -> list[int]:
    """The next token of each sequence as `pick` chooses it, known on every rank of the replica."""
    world = model.world
    length = row_length([sum(map(len, feed))], world.tensor_size)
    # flatten asks for the token after each position: the last one has none yet
    ids = [np.array([*tokens, 0]) for tokens in feed]
    batch = flatten([i[:-1] for i in ids], [np.zeros(0, dtype=np.int64)] * len(ids), length, world.torch_device)
    ends = batch.segments[:, :2].sum(1) - 1
    starts = torch.repeat_interleave(cache.past[cache.rows], batch.segments[:, 1])
    position_ids = batch.position_ids.clone()
    position_ids[0, : len(starts)] += starts.to(position_ids.device)
    batch = MicroBatch(batch.tokens, position_ids, batch.segments, ends, batch.gold)
    result = torch.zeros(len(feed), dtype=torch.int64, device=world.torch_device)

    def keep(_: MicroBatch, tokens: Tensor) -> None:
        result.copy_(tokens)

    forward(model, [batch], pick, consume=keep)
    if world.pipeline_size > 1:
        dist.broadcast(result, src=dist.get_process_group_ranks(world.pipeline_group)[-1], group=world.pipeline_group)
    return [int(token) for token in result.tolist()]


def _argmax(
    hidden: Tensor,
    weight: Tensor,
    shard: VocabShard,
    vocab_size: int,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Id of the largest logit of each row, the lowest id among equals; [N] int64, the same on every tensor rank.

    With Gumbel noise [N, vocab_size] it is a draw from the softmax of logits / temperature.
    """
    logits = (hidden @ weight.t()).float().nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    real, ids = shard.by_id(logits, vocab_size)
    if noise is not None:
        real = real / temperature + noise[:, ids]
    if len(ids):
        value, column = real.max(1)  # of equal ones the first, which is the lowest id
        id = ids[column]
    else:
        value, id = logits.new_full(logits.shape[:1], -torch.inf), ids.new_full(logits.shape[:1], vocab_size)
    values, found = shard.gather(value, id)
    return torch.where(values == values.amax(0), found, vocab_size).amin(0)


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
