"""Striped vocabularies: the order of the rows, and the operators over them; whole, in pieces, compare."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_replay.errors import LayoutError
from megatron_replay.models.weights import STRIPES, restripe
from megatron_replay.ops import (
    CandidateSets,
    VocabShard,
    dynamic_topk,
    linear_cross_entropy,
    restricted_linear_cross_entropy,
)
from megatron_replay.ops.shard import Stripes

V, REAL, N, H = 384, 301, 12, 6
ORDER = Stripes(V, STRIPES)
IDS = torch.arange(V)


def test_the_order_is_a_bijection_and_the_documented_one() -> None:
    rows = ORDER.row_of(IDS)
    assert sorted(rows.tolist()) == IDS.tolist()
    assert rows.tolist() == [v % 8 * (V // 8) + v // 8 for v in range(V)]
    assert torch.equal(ORDER.id_of(rows), IDS) and torch.equal(ORDER.row_of(ORDER.id_of(IDS)), IDS)
    assert ORDER.row_of(IDS.int()).dtype == torch.int32


def test_tensors_are_moved_as_ids_are() -> None:
    whole = torch.randn(V, 3)
    striped = restripe(whole, striped=True)
    assert torch.equal(striped[ORDER.row_of(IDS)], whole)
    assert torch.equal(restripe(striped, striped=False), whole)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 16])
@pytest.mark.parametrize("vocab_size", [None, REAL, 100, 3, 384])
def test_every_real_id_is_in_one_shard_and_the_rest_is_padding(ranks: int, vocab_size: int | None) -> None:
    size, found = V // ranks, []
    logits = ORDER.id_of(IDS)[None].float()  # each column holds its id
    for stripes, row in ((None, IDS[None].float()), (ORDER, logits)):
        found = []
        for rank in range(ranks):
            shard = VocabShard(rank * size, (rank + 1) * size, stripes=stripes)
            here = row[:, shard.start : shard.stop]
            ordered, ids = shard.by_id(here, vocab_size)
            assert ordered[0].tolist() == ids.tolist() == sorted(ids.tolist())
            columns = shard.columns(ids).tolist()
            assert here[0, columns].tolist() == ids.tolist()
            assert sorted([*columns, *shard.padding(vocab_size, ids.device).tolist()]) == list(range(size))
            found += ids.tolist()
        assert sorted(found) == list(range(vocab_size or V))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_whole_stripes_lie_on_each_rank_and_neighbouring_ids_on_different_ones(ranks: int) -> None:
    size = V // ranks
    where = ORDER.row_of(IDS) // size
    assert torch.equal(where.view(-1, 8), where[:8].expand(V // 8, 8)), "every eight ids the same pattern"
    assert where[:8].bincount().tolist() == [8 // ranks] * ranks


@pytest.mark.parametrize("stripes", [None, ORDER])
def test_ids_that_are_not_here_have_no_column(stripes: Stripes | None) -> None:
    shard = VocabShard(0, V, stripes=stripes)
    assert shard.columns(torch.tensor([-9, -1, V, V + 7, 2**31 - 1])).tolist() == [-1] * 5
    assert VocabShard(48, 96, stripes=ORDER).columns(torch.tensor([0, 1, 2, 9])).tolist() == [-1, 0, -1, 1]
    assert VocabShard(48, 48, stripes=stripes).columns(IDS).unique().tolist() == [-1]
    ordered, ids = VocabShard(48, 48, stripes=stripes).by_id(torch.empty(3, 0), REAL)
    assert ordered.shape == (3, 0) and ids.shape == (0,)


def test_stripes_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(LayoutError, match="389 vocabulary rows do not divide into 8 stripes"):
        Stripes(389, 8)
    with pytest.raises(LayoutError, match="up to row 400"):
        VocabShard(0, 400, stripes=ORDER)


def numbers(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) for n in (N, V))
    if kind == "ties":
        hidden, weight = hidden.round(), weight.sign()
    weight[REAL:] = 1e3  # a padding row that took part would be seen
    return hidden, weight, torch.randint(REAL, (N,), generator=g)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["spread", "ties"])
@pytest.mark.parametrize(("tau", "k_max"), [(0.95, 200), (0.6, 5), (1.0, 1000), (0.99, 40)])
def test_the_sets_are_those_of_rows_by_id(kind: str, tau: float, k_max: int, kernels: str) -> None:
    hidden, weight, gold = numbers(kind)
    rest = {"vocab_size": REAL, "always": (3, REAL - 1), "keep_logits": True, "kernels": kernels}
    logits = hidden @ weight.t()
    plain = dynamic_topk(logits, gold, tau, k_max, **rest).check(REAL)
    striped = dynamic_topk(logits[:, ORDER.id_of(IDS)], gold, tau, k_max, shard=VocabShard(0, V, stripes=ORDER), **rest)
    for name in ("offsets", "ids", "gold_slot", "logits"):
        assert torch.equal(getattr(striped, name), getattr(plain, name)), name
    torch.testing.assert_close(striped.lse, plain.lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(striped.outside_mass, plain.outside_mass, rtol=1e-6, atol=1e-14)
    if kind == "ties" and k_max == 5:
        by_row = dynamic_topk(logits[:, ORDER.id_of(IDS)][:, :REAL], gold, tau, k_max)
        assert not torch.equal(ORDER.id_of(by_row.ids.long()).sort().values, plain.ids.long().sort().values), (
            "the ties are there to be cut"
        )


@pytest.mark.parametrize("loss", ["restricted", "full"])
def test_losses_and_gradients_are_those_of_rows_by_id(loss: str) -> None:
    hidden, weight, gold = numbers("spread")
    sets = dynamic_topk(hidden @ weight.t(), gold, 0.9, 30, REAL)
    answers = []
    for rows, shard in ((IDS, None), (ORDER.id_of(IDS), VocabShard(0, V, stripes=ORDER))):
        h, w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
        if loss == "restricted":
            out = restricted_linear_cross_entropy(h, w, sets, shard)
        else:
            out = linear_cross_entropy(h, w, gold, shard, vocab_size=REAL, chunk_rows=5)
        dh, dw = torch.autograd.grad((out * torch.arange(1.0, N + 1)).sum(), (h, w))
        answers.append((out.detach(), dh, dw if shard is None else dw[ORDER.row_of(IDS)]))
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_shard_of_padding_alone_adds_nothing() -> None:
    hidden, weight, _ = numbers("spread")
    gold = torch.zeros(N, dtype=torch.long)
    shard = VocabShard(0, V, stripes=ORDER)
    found = linear_cross_entropy(hidden, weight.requires_grad_(), gold, shard, vocab_size=1)
    assert torch.equal(found, torch.zeros(N)), "one real id has all the probability"
    found.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_gold_id_among_the_padding_is_still_refused() -> None:
    hidden, weight, gold = numbers("spread")
    gold[4] = REAL
    shard = VocabShard(0, V, stripes=ORDER)
    for call in (
        lambda: dynamic_topk(hidden @ weight.t(), gold, vocab_size=REAL, shard=shard),
        lambda: full(hidden, weight, gold, shard),
    ):
        with pytest.raises(Exception, match=f"gold id {REAL} of row 4"):
            call()


def full(hidden: Tensor, weight: Tensor, gold: Tensor, shard: VocabShard) -> Tensor:
    return linear_cross_entropy(hidden, weight, gold, shard, vocab_size=REAL)


@pytest.mark.parametrize("stripes", [None, ORDER])
def test_local_sets_point_at_the_rows_of_their_ids(stripes: Stripes | None) -> None:
    sets = CandidateSets.from_lists([[5, 9, 200], [8, 16]], [9, 16])
    shard = VocabShard(0, V, stripes=stripes)
    here = sets.local(shard)
    back = here.columns if stripes is None else stripes.id_of(here.columns)
    assert back.tolist() == sets.ids.tolist() and here.gold.tolist() == [1, 4]
    assert here.columns.dtype == torch.int32
