"""The operators over a sharded vocabulary: whole, in pieces, compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from each_loss import each_loss
from torch import Tensor

from megatron_replay.errors import DataError, LayoutError
from megatron_replay.ops import (
    CandidateSets,
    VocabShard,
    dynamic_topk,
    linear_cross_entropy,
    restricted_linear_cross_entropy,
    restricted_linear_terms,
    target_logprobs,
)

N, V, REAL, H = 24, 512, 389, 8  # with four ranks the last shard is all padding, the one before it partly
EXACT = {"atol": 1e-12, "rtol": 1e-12}
FIELDS = ("offsets", "ids", "gold_slot", "logits", "lse", "outside_mass")


def problem(kind: str = "double") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) for n in (N, V))
    weight[REAL:] = 1e3
    gold = torch.randint(REAL, (N,), generator=g)
    if kind == "integer":
        hidden, weight = hidden.round(), weight.sign()
    if kind == "bf16":
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    return hidden, weight, gold


def mine() -> VocabShard:
    return VocabShard.of_rank(V, dist.group.WORLD)


ALWAYS = (3, REAL - 1)


def collect(kind: str, tau: float, k_max: int) -> list[Tensor | None]:
    hidden, weight, gold = problem(kind)
    logits, shard = hidden @ weight.t(), mine()
    sets = dynamic_topk(
        logits[:, shard.start : shard.stop], gold, tau, k_max, REAL, shard, always=ALWAYS, keep_logits=True
    )
    return [getattr(sets, name) for name in FIELDS]


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("kind", ["double", "integer", "bf16"])
@pytest.mark.parametrize(("tau", "k_max"), [(0.95, 200), (0.6, 5), (1.0, 1000), (0.99, 40)])
def test_the_sets_do_not_depend_on_the_ranks(ranks, world: int, kind: str, tau: float, k_max: int) -> None:
    hidden, weight, gold = problem(kind)
    whole = dynamic_topk(hidden @ weight.t(), gold, tau, k_max, REAL, always=ALWAYS, keep_logits=True).check(REAL)
    for rank in ranks(world).run(collect, kind, tau, k_max):
        for name, ours in zip(FIELDS, rank, strict=True):
            tight = {"atol": 1e-14, "rtol": 1e-6} if name in ("outside_mass", "lse") else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(ours, getattr(whole, name), **tight, msg=lambda m, name=name: f"{name}: {m}")


def equal_logits() -> list[list[int]]:
    shard = mine()
    sets = dynamic_topk(torch.zeros(2, shard.size), torch.tensor([0, 511]), tau=0.75, k_max=400, shard=shard)
    return [sets.ids.tolist(), sets.offsets.tolist()]


def test_massive_ties_are_cut_at_the_same_id(ranks) -> None:
    for ids, offsets in ranks(4).run(equal_logits):
        assert ids == [*range(384), *range(384), 511]
        assert offsets == [0, 384, 769]


def traffic() -> tuple[int, int]:
    """Bytes that this rank received from the others in one selection from a vocabulary of Qwen's size, and if the
    logits were gathered."""
    received = 0
    all_gather, all_to_all = dist.all_gather, dist.all_to_all_single

    def gathering(parts: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        nonlocal received
        received += (len(parts) - 1) * parts[0].nbytes
        return all_gather(parts, *args, **kwargs)

    def exchanging(out: Tensor, packed: Tensor, sizes: list[int], *args: Any, **kwargs: Any) -> Any:
        nonlocal received
        received += out.nbytes * (len(sizes) - 1) // len(sizes)
        return all_to_all(out, packed, sizes, *args, **kwargs)

    shard = VocabShard.of_rank(151936, dist.group.WORLD)
    logits = torch.randn(64, shard.size, generator=torch.Generator().manual_seed(dist.get_rank()))
    logits[:, :30] += 12  # about 90 ids of a row reach 0.95
    dist.all_gather, dist.all_to_all_single = gathering, exchanging  # in this process, for this call
    try:
        sets = dynamic_topk(logits, torch.arange(64), shard=shard, keep_logits=True)
    finally:
        dist.all_gather, dist.all_to_all_single = all_gather, all_to_all
    assert 60 < len(sets.ids) / 64 < 150
    return received, (dist.get_world_size() - 1) * logits.nbytes


def test_what_travels_is_little(ranks) -> None:
    for received, logits in ranks(4).run(traffic):
        assert logits / received > 200


def losses(kind: str) -> dict[str, tuple[Tensor, ...]]:
    """Loss, summed hidden gradient and local weight gradient of every loss on this rank."""
    hidden, weight, gold = problem()
    sets, shard = dynamic_topk(hidden @ weight.t(), gold, 0.9, 30, REAL), mine()
    if kind == "one shard":  # every candidate on the first rank
        sets = CandidateSets.from_lists([[0, 1 + t] for t in range(N)], [0] * N)
    scale = torch.arange(1.0, N + 1, dtype=torch.float64)
    return each_loss(hidden, weight[shard.start : shard.stop], sets, gold, shard, scale, real=REAL, chunk_rows=7)


def whole_losses(kind: str) -> dict[str, tuple[Tensor, ...]]:
    hidden, weight, gold = problem()
    sets = dynamic_topk(hidden @ weight.t(), gold, 0.9, 30, REAL)
    if kind == "one shard":
        sets = CandidateSets.from_lists([[0, 1 + t] for t in range(N)], [0] * N)
    hidden.requires_grad_(), weight.requires_grad_()
    scale = torch.arange(1.0, N + 1, dtype=torch.float64)
    restricted, full = (
        restricted_linear_cross_entropy(hidden, weight, sets),
        linear_cross_entropy(hidden, weight, gold, vocab_size=REAL),
    )
    parts = {
        name: (x.detach(), *torch.autograd.grad((x * scale).sum(), (hidden, weight)))
        for name, x in (("restricted", restricted), ("full", full))
    }
    return {**parts, "logits": parts["restricted"], "logits, plain torch": parts["restricted"]}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["spread", "one shard"])
def test_losses_and_gradients_are_those_of_the_whole(ranks, world: int, kind: str) -> None:
    whole = whole_losses(kind)
    for rank, parts in enumerate(ranks(world).run(losses, kind)):
        rows = slice(rank * V // world, (rank + 1) * V // world)
        for name, (loss, dh, dw) in parts.items():
            torch.testing.assert_close(loss, whole[name][0], **EXACT)
            torch.testing.assert_close(dh, whole[name][1], **EXACT)
            torch.testing.assert_close(dw, whole[name][2][rows], **EXACT)


def soft(sets: CandidateSets) -> tuple[Tensor, Tensor]:
    """Targets that sum to 1 at each position, and weights of which every third is 0."""
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(len(sets.ids), generator=g, dtype=torch.float64)
    rows = torch.repeat_interleave(sets.sizes())
    sums = torch.zeros(N, dtype=torch.float64).index_add_(0, rows, drawn)
    return drawn / sums[rows], torch.arange(N, dtype=torch.float64) % 3


def aimed_losses(kind: str) -> dict[str, tuple[Tensor, ...]]:
    """On a rank: `each_loss` of sets with targets and weights."""
    hidden, weight, gold = problem()
    sets = sets_for(kind)
    targets, weights = soft(sets)
    shard, scale = mine(), torch.arange(1.0, N + 1, dtype=torch.float64)
    here = sets.local(shard, targets=targets, weights=weights)
    return each_loss(hidden, weight[shard.start : shard.stop], here, gold, shard, scale, real=REAL, chunk_rows=7)


def sets_for(kind: str) -> CandidateSets:
    """The model's own sets; or sets whose ids all lie on the first of many ranks."""
    if kind == "one shard":
        return CandidateSets.from_lists([[0, 1 + t] for t in range(N)], [0] * N)
    hidden, weight, gold = problem()
    return dynamic_topk(hidden @ weight.t(), gold, 0.9, 30, REAL)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("kind", ["spread", "one shard"])
def test_targets_and_weights_over_ranks_are_those_of_the_formula(ranks, world: int, kind: str) -> None:
    hidden, weight, _ = problem()
    sets = sets_for(kind)
    targets, weights = soft(sets)
    hidden.requires_grad_(), weight.requires_grad_()
    logits = hidden @ weight.t()
    rows = torch.repeat_interleave(sets.sizes())
    y = torch.zeros_like(logits).index_put((rows, sets.ids.long()), targets)
    kept = torch.zeros_like(logits).index_put((rows, sets.ids.long()), torch.tensor(1.0, dtype=torch.float64))
    truth = weights * (logits.masked_fill(kept == 0, -torch.inf).logsumexp(1) - (y * logits).sum(1))
    scale = torch.arange(1.0, N + 1, dtype=torch.float64)
    dh, dw = torch.autograd.grad((truth * scale).sum(), (hidden, weight))
    for rank, parts in enumerate(ranks(world).run(aimed_losses, kind)):
        here = slice(rank * V // world, (rank + 1) * V // world)
        for name in ("restricted", "logits", "logits, plain torch"):
            torch.testing.assert_close(parts[name][0], truth.detach(), **EXACT)
            torch.testing.assert_close(parts[name][1], dh, **EXACT)
            torch.testing.assert_close(parts[name][2], dw[here], **EXACT)


def terms(kind: str, aimed: bool) -> tuple[Tensor, ...]:
    """On a rank: loss and log-sum-exp of a set, then the summed hidden gradient and the weight's of a sum of both."""
    hidden, weight, _ = problem()
    sets, shard = sets_for(kind), mine()
    targets, weights = soft(sets)
    here = sets.local(shard, targets=targets, weights=weights) if aimed else sets
    rows = weight[shard.start : shard.stop].clone().requires_grad_()
    loss, lse = restricted_linear_terms(hidden.requires_grad_(), rows, here, shard)
    dh, dw = torch.autograd.grad((loss + 0.01 * lse.square()).sum(), (hidden, rows))
    dist.all_reduce(dh)
    return loss.detach(), lse.detach(), dh, dw


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["spread", "one shard"])
@pytest.mark.parametrize("aimed", [False, True])
def test_the_log_sum_exp_is_of_the_set_over_all_ranks(ranks, world: int, kind: str, aimed: bool) -> None:
    hidden, weight, _ = problem()
    sets = sets_for(kind)
    targets, weights = soft(sets)
    here = sets.local(VocabShard(0, V), targets=targets, weights=weights) if aimed else sets
    hidden.requires_grad_(), weight.requires_grad_()
    each = sets.ids.long().split(sets.sizes().tolist())
    lse = torch.stack([row[ids].logsumexp(0) for row, ids in zip(hidden @ weight.t(), each, strict=True)])
    loss = restricted_linear_cross_entropy(hidden, weight, here)
    dh, dw = torch.autograd.grad((loss + 0.01 * lse.square()).sum(), (hidden, weight))
    for rank, found in enumerate(ranks(world).run(terms, kind, aimed)):
        wanted = (loss.detach(), lse.detach(), dh, dw[rank * V // world : (rank + 1) * V // world])
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-11)


def without_positions() -> list[int]:
    shard = mine()
    none, weight = torch.empty(0, H), torch.zeros(shard.size, H)
    gold = torch.empty(0, dtype=torch.long)
    sets = dynamic_topk(torch.empty(0, shard.size), gold, shard=shard)
    restricted = restricted_linear_cross_entropy(none, weight, sets, shard)
    return [sets.num_positions, restricted.numel(), target_logprobs(none, weight, gold, shard).numel()]


def test_no_positions_are_no_positions_on_every_rank(ranks) -> None:
    assert ranks(2).run(without_positions) == [[0, 0, 0]] * 2


def broken(what: str) -> str:
    shard = mine()
    logits, gold = torch.zeros(3, shard.size), torch.tensor([0, 1, 2])
    if what == "nan" and dist.get_rank() == 1:
        logits[1, 4] = torch.nan
    if what == "gold":
        gold[2] = V
    try:
        dynamic_topk(logits, gold, shard=shard)
    except DataError as err:
        return str(err)
    return "accepted"


def test_every_rank_sees_what_one_rank_has_wrong(ranks) -> None:
    said = ranks(2).run(broken, "nan")
    assert said[0] == said[1] and "row 1" in said[0] and "NaN" in said[0]
    said = ranks(2).run(broken, "gold")
    assert said[0] == said[1] and "gold id 512 of row 2" in said[0]


def uneven() -> str:
    try:
        VocabShard.of_rank(511, dist.group.WORLD)
    except LayoutError as err:
        return str(err)
    return "accepted"


def test_rows_that_do_not_divide_are_refused(ranks) -> None:
    assert all("511" in said for said in ranks(2).run(uneven))
