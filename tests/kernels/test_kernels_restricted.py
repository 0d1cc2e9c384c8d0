"""The compiled restricted loss against the plain one, at its edges.

Threads and instruction sets must not change a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_replay.kernels.library import choose
from megatron_replay.kernels.precision import accumulator
from megatron_replay.ops import CandidateSets, VocabShard, restricted_linear_cross_entropy, restricted_linear_terms
from megatron_replay.ops.local_sets import ByColumn, LocalSets

pytestmark = pytest.mark.usefixtures("compiled")
ISAS = ("baseline", "avx2", "avx512")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-13}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OURS, PLAIN = choose("auto"), choose("reference")


def sets_of(sizes: Sequence[int], vocab: int, seed: int = 0, zipf: bool = False) -> CandidateSets:
    """Sets of these sizes; by Zipf's law the low ids are in most of them."""
    gen = torch.Generator().manual_seed(seed)
    odds = 1 / torch.arange(1.0, vocab + 1) if zipf else torch.ones(vocab)
    rows = [torch.multinomial(odds, size, generator=gen).tolist() for size in sizes]
    return CandidateSets.from_lists(rows, [row[0] for row in rows])


CASES = {
    "random": ([1, 2, 3, 5, 8, 9, 13, 40, 64, 65], 300, 64),
    "one": ([1] * 5, 20, 33),
    "cap": ([201] * 7, 400, 48),
    "odd width": ([7, 30, 12], 50, 17),
    "narrow": ([7, 30, 12], 50, 1),
    "no positions": ([], 50, 16),
    "one position": ([11], 50, 576),
}


def inputs(case: str, dtype: torch.dtype, zipf: bool = False) -> tuple[Tensor, Tensor, CandidateSets]:
    sizes, vocab, width = CASES[case]
    gen = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, width, generator=gen, dtype=torch.float64).to(dtype) for n in (len(sizes), vocab))
    return hidden, weight, sets_of(sizes, vocab, zipf=zipf)


def close(ours: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    scale = float(plain.abs().max()) if plain.numel() else 1.0
    torch.testing.assert_close(ours, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(scale, 1e-30))


def targets(sets: CandidateSets, dtype: torch.dtype) -> Tensor:
    """Random targets [m] in the dtype of sums; some are 0."""
    y = torch.rand(len(sets.ids), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return y.sub_(0.1).clamp_(min=0).to(accumulator(dtype))


def tables(sets: CandidateSets, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    here = sets.local(VocabShard(0, vocab))
    return here.offsets, here.columns, here.gold


@dtypes
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("zipf", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_the_references(case: str, zipf: bool, soft: bool, dtype: torch.dtype) -> None:
    hidden, weight, sets = inputs(case, dtype, zipf)
    offsets, columns, gold = tables(sets, weight.shape[0])
    y = targets(sets, dtype) if soft else None
    found = OURS.restricted_fwd(hidden, weight, offsets, columns, gold, True, y)
    wanted = PLAIN.restricted_fwd(hidden, weight, offsets, columns, gold, True, y)
    for ours, plain in zip(found, wanted, strict=True):
        close(ours, plain, dtype)
    alone = OURS.restricted_fwd(hidden, weight, offsets, columns, gold, False, y)
    assert torch.equal(alone[0], found[0]) and torch.equal(alone[1], found[1])
    assert alone[2].shape == alone[3].shape == (0, hidden.shape[1])
    scale = wanted[1][:2].contiguous()
    both = [t.clone() for t in (found[2], wanted[2])]
    OURS.restricted_bwd_dh(both[0], weight, columns, gold, scale, found[3] if soft else None)
    PLAIN.restricted_bwd_dh(both[1], weight, columns, gold, scale, wanted[3] if soft else None)
    close(both[0], both[1], dtype)
    coefficient = wanted[0]
    entries = ByColumn.of(offsets, columns).entries(coefficient)
    close(*(ops.restricted_bwd_rows(hidden, *entries) for ops in (OURS, PLAIN)), dtype)


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_targets_at_gold_alone_give_the_bits_of_the_hard_statistics(case: str, dtype: torch.dtype) -> None:
    hidden, weight, sets = inputs(case, dtype)
    offsets, columns, gold = tables(sets, weight.shape[0])
    y = torch.zeros_like(targets(sets, dtype)).index_fill_(0, gold, 1)
    hard, soft = (OURS.restricted_fwd(hidden, weight, offsets, columns, gold, True, some) for some in (None, y))
    assert all(map(torch.equal, hard[:3], soft[:3]))
    assert torch.equal(soft[3], weight[columns[gold]].to(y.dtype))


@dtypes
@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_the_weight_gradient_is_added_into_any_matrix(dtype: torch.dtype, kept: torch.dtype, strided: bool) -> None:
    hidden, weight, sets = inputs("random", dtype, zipf=True)
    offsets, columns, _ = tables(sets, weight.shape[0])
    coefficient = torch.linspace(-1, 1, len(columns)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    before = torch.arange(weight.numel()).view(weight.shape).sin().to(kept)
    ours, plain = (before.t().contiguous().t() if strided else before.clone() for _ in range(2))
    entries = ByColumn.of(offsets, columns).entries(coefficient)
    OURS.restricted_bwd_dw(hidden, *entries, ours)
    PLAIN.restricted_bwd_dw(hidden, *entries, plain)
    step = torch.finfo(kept).eps
    torch.testing.assert_close(
        ours, plain, rtol=max(step, TOLERANCE[dtype]), atol=max(step, TOLERANCE[dtype]) * float(plain.abs().max())
    )
    touched = columns.long().unique()
    untouched = torch.ones(weight.shape[0], dtype=torch.bool).index_fill(0, touched, False)
    assert torch.equal(ours[untouched], before[untouched])


def results(hidden: Tensor, weight: Tensor, sets: CandidateSets | LocalSets, **options: object) -> tuple[Tensor, ...]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = restricted_linear_cross_entropy(hidden, weight, sets, **options)  # type: ignore[arg-type]
    factors = torch.linspace(0.5, 1, len(loss), dtype=loss.dtype)
    return (loss.detach(), *torch.autograd.grad((loss * factors).sum(), (hidden, weight)))


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_threads_and_instruction_sets_give_the_same_bits(
    case: str, dtype: torch.dtype, with_isa: Callable[[str], bool], with_threads: Callable[[int], None]
) -> None:
    hidden, weight, hard = inputs(case, dtype, zipf=True)
    soft = hard.local(VocabShard(0, weight.shape[0]), targets=targets(hard, dtype))
    runs = []
    for isa in ISAS:
        for threads in (1, 2, 3, 5):
            with_threads(threads)
            if with_isa(isa):
                runs.append([*results(hidden, weight, hard), *results(hidden, weight, soft)])
    assert runs and all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@dtypes
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_and_its_gradients_are_the_references(soft: bool, dtype: torch.dtype) -> None:
    hidden, weight, sets = inputs("random", dtype)
    here = sets.local(VocabShard(0, weight.shape[0]), targets=targets(sets, dtype) if soft else None)
    for ours, plain in zip(
        results(hidden, weight, here), results(hidden, weight, here, kernels="reference"), strict=True
    ):
        torch.testing.assert_close(
            ours, plain, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=20 * TOLERANCE[dtype]
        )


def test_gradcheck() -> None:
    hidden, weight, sets = inputs("odd width", torch.float64)
    some = hidden[:, :5].clone().requires_grad_(), weight[:, :5].clone().requires_grad_()
    soft = sets.local(VocabShard(0, weight.shape[0]), targets=targets(sets, torch.float64))
    for here in (sets, soft):
        assert torch.autograd.gradcheck(lambda h, w, here=here: restricted_linear_terms(h, w, here), some)


def test_float32_gradients_are_those_of_float64() -> None:
    hidden, weight, sets = inputs("cap", torch.float32)
    exact = results(hidden.double(), weight.double(), sets, kernels="reference")
    for ours, right in zip(results(hidden, weight, sets), exact, strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm()


@dtypes
def test_the_whole_vocabulary_is_ordinary_cross_entropy(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 40, generator=gen).to(dtype) for n in (6, 333))
    gold = torch.tensor([0, 332, 7, 7, 1, 90])
    sets = CandidateSets.from_lists([range(333)] * 6, gold.tolist())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h, w = hidden.to(wide).requires_grad_(), weight.to(wide).requires_grad_()
    truth = cross_entropy(h @ w.t(), gold, reduction="none")
    wanted = (truth.detach(), *torch.autograd.grad((truth * torch.linspace(0.5, 1, 6, dtype=wide)).sum(), (h, w)))
    for ours, right in zip(results(hidden, weight, sets), wanted, strict=True):
        torch.testing.assert_close(
            ours, right.to(ours.dtype), rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )


def test_sets_of_65535_ids() -> None:
    gen = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(2, 24, generator=gen), torch.randn(66_000, 24, generator=gen)
    sets = CandidateSets.from_lists([range(65_535), range(400, 65_935)], [65_534, 400])
    exact = results(hidden.double(), weight.double(), sets, kernels="reference")
    for ours, right in zip(results(hidden, weight, sets), exact, strict=True):
        assert (ours.double() - right).norm() <= 1e-5 * right.norm()  # 65,535 float32 additions


@dtypes
def test_a_shard_without_candidates_adds_nothing(dtype: torch.dtype) -> None:
    hidden, weight, _ = inputs("random", dtype)
    sets = CandidateSets.from_lists([[1, 2], [250, 260]], [2, 250])
    here: LocalSets = sets.local(VocabShard(0, 30, group=object()))  # type: ignore[arg-type]
    z, stats, mixture, _ = OURS.restricted_fwd(hidden[:2], weight[:30], here.offsets, here.columns, here.gold, True)
    assert len(z) == 2 and stats[:, 1].tolist() == pytest.approx([-3e38, 0.0, 0.0]) and not mixture[1].any()
    none = sets.local(VocabShard(40, 40, group=object()))  # type: ignore[arg-type]
    z, stats, mixture, _ = OURS.restricted_fwd(hidden[:2], weight[:0], none.offsets, none.columns, none.gold, True)
    assert len(z) == 0 and stats[1:].eq(0).all() and not mixture.any() and stats.isfinite().all()
    grad = torch.ones(0, weight.shape[1], dtype=dtype)
    OURS.restricted_bwd_dw(hidden[:2], *ByColumn.of(none.offsets, none.columns).entries(z), grad)


@dtypes
def test_tensors_that_are_not_contiguous(dtype: torch.dtype) -> None:
    hidden, weight, sets = inputs("random", dtype)
    wanted = results(hidden, weight, sets)
    wide = torch.cat([weight, weight], 1)[:, : weight.shape[1]]
    for h, w in (
        (hidden.t().contiguous().t(), weight.t().contiguous().t()),
        (torch.stack([hidden, hidden], 1)[:, 1], wide),
    ):
        leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
        loss = restricted_linear_cross_entropy(*leaves, sets)
        assert torch.equal(loss, wanted[0])
        factors = torch.linspace(0.5, 1, len(loss), dtype=loss.dtype)
        for ours, right in zip(torch.autograd.grad((loss * factors).sum(), leaves), wanted[1:], strict=True):
            assert torch.equal(ours, right)


def test_logits_without_bounds() -> None:
    hidden, weight = torch.ones(2, 16), torch.zeros(40, 16)
    weight[3], weight[20] = 1e4, -1e4
    sets = CandidateSets.from_lists([range(40), [20, 3]], [3, 20])
    loss, dh, dw = results(hidden, weight, sets)
    assert loss.tolist() == [0.0, 320_000.0] and dh.isfinite().all() and dw.isfinite().all()
    weight[5, 0] = torch.nan
    assert restricted_linear_cross_entropy(hidden, weight, sets).isnan().tolist() == [True, False]


def test_what_does_not_fit_is_an_error() -> None:
    hidden, weight, sets = inputs("random", torch.float32)
    offsets, columns, gold = tables(sets, weight.shape[0])
    fwd = OURS.restricted_fwd
    with pytest.raises(RuntimeError, match="a column lies outside the 30 rows"):
        fwd(hidden, weight[:30], offsets, columns, gold, True)
    with pytest.raises(RuntimeError, match="a column lies outside"):
        fwd(hidden, weight, offsets, columns - 300, gold, True)
    with pytest.raises(RuntimeError, match="offsets must rise"):
        fwd(hidden, weight, offsets.flip(0), columns, gold, True)
    with pytest.raises(RuntimeError, match="offsets must be contiguous"):
        fwd(hidden, weight, offsets.int(), columns, gold, True)
    with pytest.raises(RuntimeError, match="gold of position 0 points outside"):
        fwd(hidden, weight, offsets, columns, gold + 10_000, True)
    with pytest.raises(RuntimeError, match="gold of position 1 points outside its set"):
        fwd(hidden, weight, offsets, columns, torch.cat([gold[:1], gold[:-1]]), True)
    with pytest.raises(RuntimeError, match="hidden is"):
        fwd(hidden.double(), weight, offsets, columns, gold, True)
    with pytest.raises(RuntimeError, match="kernels=reference takes others"):
        fwd(hidden.half(), weight.half(), offsets, columns, gold, True)
    with pytest.raises(RuntimeError, match="sets for 9 hidden states"):
        fwd(hidden[:9], weight, offsets, columns, gold, True)
    z = fwd(hidden, weight, offsets, columns, gold, False)[0]
    for wrong in (z[1:], z.double(), z[:, None], z.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match=rf"restricted_fwd: targets must be contiguous \[{len(z)}\] Float"):
            fwd(hidden, weight, offsets, columns, gold, True, wrong)
    with pytest.raises(RuntimeError, match="coefficient must be"):
        OURS.restricted_bwd_dw(hidden, *ByColumn.of(offsets, columns).entries(z)[:3], z[:3], torch.zeros_like(weight))
