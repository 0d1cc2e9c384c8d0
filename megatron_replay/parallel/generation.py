"""Continuations by a sharded model, greedy or sampled, with a key/value cache.

Prompts are dealt out over the data-parallel replicas; every rank gets every continuation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_replay.parallel.batch import MicroBatch, Task, flatten, row_length
from megatron_replay.parallel.inference import Progress, in_groups
from megatron_replay.parallel.mcore.attention import Cache
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.sampling import Sampling, argmax


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
        return lambda _, hidden, weight: argmax(hidden, weight, shard, size)

    def draw(_: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        noise = sampling.noise(numbers, length, size)
        return argmax(hidden, weight, shard, size, noise.to(hidden.device), sampling.temperature)

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
