"""Stage 0: the candidate set of each position, exact and the same for every layout (arXiv 2510.09152, section 2).

N positions, V vocabulary rows here, R ranks that share the vocabulary, K candidates looked at per position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_replay.candidates import CandidateRule
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.kernels.library import choose
from megatron_replay.kernels.precision import has_float64
from megatron_replay.ops.sets import CandidateSets
from megatron_replay.ops.shard import VocabShard, shard_of

SLACK = 1e-12
"""A cumulative probability this close below tau (relative) counts as tau.

Sums in float64 differ by 1e-15 between layouts. Without slack, logits that put a cumulative probability exactly at tau
(equal ones do) would be cut differently by one rank and by four. For the same reason an outside mass below this is 0.
"""

NOBODY = torch.iinfo(torch.int32).max
"""Id of an empty slot; it sorts behind every id."""


@dataclass(frozen=True)
class _Ranked:
    """The most probable ids of each position of this rank's part, and the log-sum-exp that normalises them."""

    values: Tensor
    """[N, K] logits, descending; ties by id ascending."""
    ids: Tensor
    """[N, K] int32."""
    lse: Tensor
    """[N] float64, over the whole real vocabulary."""
    extra: Tensor
    """[N, E] logits of the gold id and of those that are always kept."""


def dynamic_topk(
    logits: Tensor,
    gold: Tensor,
    tau: float = 0.95,
    k_max: int = 200,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    *,
    min_set_size: int = 1,
    always: Sequence[int] = (),
    keep_logits: bool = False,
    kernels: str = "auto",
) -> CandidateSets:
    """The fewest most probable ids whose probability reaches `tau`, at most `k_max` of them, and the gold id.

    Ids are ranked by probability descending, ties by id ascending. K* is the fewest with cumulative probability >= tau,
    and K = min(max(K*, min_set_size), k_max). The gold id is appended when it is not among them. So a set holds at most
    k_max + 1 ids (and those of `always`). An id whose logit is -inf has no probability and enters only as gold; tau = 1
    keeps every other id up to k_max.

    Probabilities and sums are float64 whatever the dtype of the logits, and every rank returns the same sets. Over a
    sharded vocabulary each rank merges the candidates of its part of the positions. So a position costs the network one
    set, not K candidates from every rank. An NPU has no float64: there a row's log-sum-exp is made of float32 sums, and
    the rest is done on the cpu.

    Args:
        logits: [N, V] floating, the columns shard.start..shard.stop of the vocabulary.
        gold: [N] integer, global ids.
        vocab_size: ids from here on are padding rows and never enter a set, nor the softmax.
        shard: the part of the vocabulary in `logits`; None: all of it.
        min_set_size: keep at least so many of the most probable; a set of one has no gradient.
        always: ids that enter every set, as the gold id does (the token that ends an answer, say).
        keep_logits: also return the logits of the kept ids.
        kernels: "auto" or "reference".

    Raises:
        ConfigError: tau outside (0, 1], k_max below 1, or min_set_size outside 1..k_max, or an id of `always` is no id
            of the vocabulary.
        DataError: NaN or +inf logits, a row without a finite logit, or a gold id outside the vocabulary; it names the
            row, on every rank.
    """
    shard = shard_of(logits.shape[1], shard)
    if gold.shape != logits.shape[:1]:
        raise DataError(
            f"logits of shape {tuple(logits.shape)} need one gold id a row, got gold of shape {tuple(gold.shape)}"
        )
    rule = CandidateRule(tau=tau, k_max=k_max, min_set_size=min_set_size, always=tuple(sorted(set(always))))
    return _select([logits.detach()], gold, _Request(rule, vocab_size, keep_logits, kernels), shard)


def linear_dynamic_topk(
    hidden: Tensor,
    weight: Tensor,
    gold: Tensor,
    tau: float = 0.95,
    k_max: int = 200,
    vocab_size: int | None = None,
    shard: VocabShard | None = None,
    *,
    tile_rows: int = 256,
    min_set_size: int = 1,
    always: Sequence[int] = (),
    keep_logits: bool = False,
    kernels: str = "auto",
) -> CandidateSets:
    """The sets of `dynamic_topk` for a linear head, whose logits exist for `tile_rows` positions at a time.

    The tiles share one buffer.

    Args:
        hidden: [N, H] floating.
        weight: [V, H], the vocabulary rows shard.start..shard.stop.

    The others, and the errors raised, are those of `dynamic_topk`.
    """
    shard = shard_of(weight.shape[0], shard)
    if gold.shape != hidden.shape[:1]:
        raise DataError(
            f"hidden states of shape {tuple(hidden.shape)} need one gold id a row, got gold of shape "
            f"{tuple(gold.shape)}"
        )
    rule = CandidateRule(tau=tau, k_max=k_max, min_set_size=min_set_size, always=tuple(sorted(set(always))))
    tiles = _tiles(hidden.detach(), weight.detach(), tile_rows)
    return _select(tiles, gold, _Request(rule, vocab_size, keep_logits, kernels), shard)


@dataclass(frozen=True)
class _Request:
    """The arguments of `dynamic_topk` beside the tensors."""

    rule: CandidateRule
    vocab_size: int | None
    keep_logits: bool
    kernels: str


def _tiles(hidden: Tensor, weight: Tensor, tile_rows: int) -> Iterator[Tensor]:
    """Logits of `tile_rows` rows at a time, one tile at least (of no rows); each is gone when the next one comes."""
    buffer = hidden.new_empty(min(tile_rows, len(hidden)), weight.shape[0])
    for start in range(0, max(len(hidden), 1), tile_rows):
        rows = hidden[start : start + tile_rows]
        yield torch.mm(rows, weight.t(), out=buffer[: len(rows)])


def _select(tiles: Iterable[Tensor], gold: Tensor, request: _Request, shard: VocabShard) -> CandidateSets:
    """The sets: each rank ranks its columns of all rows by tiles, then merges and cuts its part of the rows."""
    rule = request.rule
    fixed = torch.tensor(rule.always, dtype=gold.dtype, device=gold.device)
    extra = torch.cat([gold[:, None], fixed.expand(len(gold), -1)], 1)
    found, start = [], 0
    for logits in tiles:
        found.append(_look(logits, extra[start : start + len(logits)], request, shard))
        start += len(logits)
    ranked = _rank(_Known(*(torch.cat(parts) for parts in zip(*found, strict=True))), extra, rule.k_max, shard)
    count = _num_kept(ranked, rule.tau, rule.min_set_size)
    own = extra[shard.own_rows(len(gold))].to(ranked.ids.device, torch.int32)
    sets = _cut(ranked, count, own, request.keep_logits).to(gold.device)
    return sets if shard.is_whole else _joined(sets, shard)


class _Known(NamedTuple):
    """A rank's knowledge of some rows, from its own columns."""

    values: Tensor
    """[N, K] the rank's largest logits."""
    ids: Tensor
    """[N, K] int32."""
    lse: Tensor
    """[N] float64."""
    extra: Tensor
    """[N, E] logits of the gold id and of those that are always kept, 0 where another rank has them."""
    mine: Tensor
    """[N, E] int32: 1 where this rank has them, else 0."""


def _look(logits: Tensor, extra: Tensor, request: _Request, shard: VocabShard) -> _Known:
    # a kernel puts the first of equal columns first, which must be the lowest id
    real, ids = shard.by_id(logits, request.vocab_size)
    values, columns, lse = choose(request.kernels).topk_rows(real, request.rule.k_max)
    ids = ids.to(torch.int32).take(columns)
    if not shard.is_whole:
        room = (0, request.rule.k_max - values.shape[1])
        values, ids = pad(values, room, value=-torch.inf), pad(ids, room, value=NOBODY)
    slot = shard.columns(extra)
    mine = (slot >= 0) if request.vocab_size is None else (slot >= 0) & (extra < request.vocab_size)
    if logits.shape[1]:
        extra_logits = torch.where(mine, logits.gather(1, slot.clamp(min=0)).to(values.dtype), 0.0)
    else:
        extra_logits = values.new_zeros(extra.shape)
    return _Known(values, ids, lse, extra_logits, mine.to(torch.int32))


def _rank(known: _Known, extra: Tensor, k_max: int, shard: VocabShard) -> _Ranked:
    """The merged candidates of all ranks: a member of the whole top k_max is in its own shard's top k_max."""
    lse, extra_logits, mine = _with_float64(*shard.gather(known.lse, known.extra, known.mine))
    lse = torch.logsumexp(lse, 0)
    _check_rows(lse, extra, mine.sum(0))  # of all rows, so that no rank waits for one that has stopped
    values, ids = _with_float64(*shard.deal(known.values, known.ids))
    values, ids = _merge(values, ids, k_max)
    own = shard.own_rows(len(lse))
    return _Ranked(values, ids, lse[own], extra_logits.sum(0)[own])


def _with_float64(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on a device where torch computes in float64: their own, or the cpu."""
    return tensors if has_float64(tensors[0].device) else tuple(t.cpu() for t in tensors)


def _check_rows(lse: Tensor, extra: Tensor, holders: Tensor) -> None:
    unusable = ~lse.isfinite()
    if bool(unusable.any()):
        row = int(unusable.nonzero()[0, 0])
        what = "no finite value" if float(lse[row]) == -torch.inf else "NaN or +inf"
        raise DataError(f"row {row} of the logits holds {what}; the model or its input is broken there")
    wrong = (holders != 1).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        id, ranks = int(extra[row, column]), int(holders[row, column])
        if column:
            raise ConfigError(
                f"id {id} is to be in every set, and is held by {ranks} ranks; is it an id of this vocabulary?"
            )
        raise DataError(f"gold id {id} of row {row} is held by {ranks} ranks; is it an id of this vocabulary?")


def _merge(values: Tensor, ids: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    """[R, N, K] of each rank -> the first k_max of all, [N, K']."""
    if values.shape[0] == 1:
        return values[0], ids[0]
    values, ids = (t.transpose(0, 1).flatten(1) for t in (values, ids))
    ids, by_id = ids.sort(1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values[:, :k_max], ids.gather(1, by_value)[:, :k_max]


def _num_kept(ranked: _Ranked, tau: float, min_set_size: int) -> Tensor:
    """[N] the number of ranked ids to keep; K* is one more than the prefixes that stay below tau."""
    usable = (ranked.values > -torch.inf).sum(1)
    if tau == 1:
        return usable
    reached = _probability(ranked.values, ranked.lse[:, None]).cumsum(1)
    fewest = (reached < tau * (1 - SLACK)).sum(1) + 1
    return fewest.clamp(min=min_set_size).minimum(usable)


def _cut(ranked: _Ranked, count: Tensor, extra: Tensor, keep_logits: bool) -> CandidateSets:
    gold = extra[:, 0]
    kept = torch.arange(ranked.ids.shape[1], device=count.device) < count[:, None]
    missing = torch.stack([~(kept & (ranked.ids == column[:, None])).any(1) for column in extra.unbind(1)], 1)
    missing[:, 1:] &= extra[:, 1:] != gold[:, None]
    kept = torch.cat([kept, missing], 1)
    ids = torch.cat([ranked.ids, extra], 1).masked_fill(~kept, NOBODY)
    values = torch.cat([ranked.values, ranked.extra], 1)
    outside = 1 - _probability(values, ranked.lse[:, None]).masked_fill(~kept, 0.0).sum(1)
    ids, order = _ascending(ids)
    taken = ids != NOBODY
    sizes = taken.sum(1)
    return CandidateSets(
        offsets=torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
        ids=ids.masked_select(taken),
        gold_slot=(ids < gold[:, None]).sum(1).to(torch.int32),
        logits=values.gather(1, order).masked_select(taken).float() if keep_logits else None,
        lse=ranked.lse.float(),
        outside_mass=outside.masked_fill(outside < SLACK, 0.0).float(),
    )


def _ascending(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of ids [N, K] int32 in order, and the index at which each id was."""
    keys = ids.long() << 32 | torch.arange(ids.shape[1], device=ids.device)  # all different, so that any sort will do
    # numpy's sort has vector instructions, which torch's lacks: ten times as fast
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if keys.device.type == "cpu" else keys.sort(1).values
    return (keys >> 32).to(torch.int32), keys & 0xFFFFFFFF


def _joined(sets: CandidateSets, shard: VocabShard) -> CandidateSets:
    """The sets of all ranks' parts of the positions."""
    columns = {name: column for name, column in sets.columns().items() if name != "offsets"}
    sizes, *whole = shard.join(sets.sizes(), *columns.values())
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return replace(sets, offsets=offsets, **dict(zip(columns, whole, strict=True)))


def _probability(logits: Tensor, lse: Tensor) -> Tensor:
    return (logits.double() - lse).exp_()
