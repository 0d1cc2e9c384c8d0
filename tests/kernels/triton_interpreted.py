"""Triton's kernels against plain torch, under Triton's interpreter on CPU tensors.

`test_kernels_triton.py` runs this by itself. Triton reads TRITON_INTERPRET when it is imported, so that has to be set
before. A program takes about 10 ms here. So there are few positions and ids, and the parts into which long runs are cut
are made small instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_replay.kernels import triton_launch
from megatron_replay.kernels.library import Kernels, choose
from megatron_replay.kernels.precision import accumulator
from megatron_replay.ops import (
    CandidateSets,
    VocabShard,
    restricted_cross_entropy,
    restricted_linear_cross_entropy,
    restricted_loss,
)
from megatron_replay.ops.local_sets import ByColumn, LocalSets

PLAIN = choose("reference")
OURS = Kernels(
    triton_launch.restricted_fwd,
    triton_launch.restricted_bwd_dh,
    triton_launch.restricted_bwd_dw,
    triton_launch.restricted_bwd_rows,
    triton_launch.restricted_logits_fwd,
    triton_launch.restricted_logits_bwd,
    PLAIN.topk_rows,
)
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6, torch.float64: 1e-13}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def sets_of(sizes: Sequence[int], vocab: int, zipf: bool = False) -> CandidateSets:
    """Sets of these sizes; by Zipf's law the low ids are in most of them.

    Golds stand at their beginning, middle and end.
    """
    gen = torch.Generator().manual_seed(0)
    odds = 1 / torch.arange(1.0, vocab + 1) if zipf else torch.ones(vocab)
    rows = [sorted(torch.multinomial(odds, size, generator=gen).tolist()) for size in sizes]
    return CandidateSets.from_lists(rows, [row[(0, len(row) // 2, -1)[t % 3]] for t, row in enumerate(rows)])


def matrices(n: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(rows, width, generator=gen, dtype=torch.float64).to(dtype) for rows in (n, vocab))
    return hidden, weight


CASES = {
    "random": (sets_of([1, 2, 5, 9, 20], 30), 30, 64),
    "zipf": (sets_of([20, 1, 23, 7, 24, 24, 3, 17, 16], 30, zipf=True), 30, 24),
    "tied": (CandidateSets.from_lists([[3, 7]] * 9 + [[7]], [7] * 10), 8, 5),
    "one": (sets_of([1] * 4, 20), 20, 33),
    "narrow": (sets_of([7, 3], 20), 20, 1),
    "no positions": (sets_of([], 5), 5, 16),
    "one position": (sets_of([11], 50), 50, 577),
}


@pytest.fixture(params=[256, 8], ids=["uncut", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with the program's own sizes, and once with runs cut into parts of 8, of whose rows a program holds 4."""
    monkeypatch.setattr(triton_launch, "SPLIT", request.param)
    if request.param == 8:
        tile = triton_launch._tile
        monkeypatch.setattr(triton_launch, "_tile", lambda width, kind: {**tile(width, kind), "ROWS": 4})


def close(ours: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    scale = float(plain.abs().max()) if plain.numel() else 1.0
    torch.testing.assert_close(ours, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(scale, 1e-30))


def check_all(hidden: Tensor, weight: Tensor, here: LocalSets) -> list[Tensor]:
    """Every operator equals the plain one; what ours gave."""
    dtype, table = hidden.dtype, (here.offsets, here.columns, here.gold)
    wanted = PLAIN.restricted_fwd(hidden, weight, *table, True, here.targets)
    subtracted = None if here.targets is None else wanted[3]
    scale = wanted[1][:2].abs().clamp(1e-3, 2).contiguous()
    grown = torch.arange(weight.numel()).view(weight.shape).sin().to(dtype)
    logits = (hidden.double() @ weight.double().t() / weight.shape[1] ** 0.5).to(dtype)
    chosen, (peak, _, _) = PLAIN.restricted_logits_fwd(logits, *table)
    scalars = torch.stack([peak, *scale])

    def results(ops: Kernels) -> list[Tensor]:
        forward = ops.restricted_fwd(hidden, weight, *table, True, here.targets)
        grad_hidden, grad_weight = wanted[2].clone(), grown.clone()
        ops.restricted_bwd_dh(grad_hidden, weight, here.columns, here.gold, scale, subtracted)
        entries = (hidden, *ByColumn.of(here.offsets, here.columns).entries(wanted[0]))
        ops.restricted_bwd_dw(*entries, grad_weight)
        grad_logits = torch.full(logits.shape, 0.25, dtype=dtype)
        ops.restricted_logits_bwd(chosen, *table, scalars, grad_logits, here.targets)
        from_logits = ops.restricted_logits_fwd(logits, *table, here.targets)
        return [*forward, grad_hidden, ops.restricted_bwd_rows(*entries), *from_logits, grad_logits, grad_weight]

    ours, plain = results(OURS), results(PLAIN)
    for found, right in zip(ours[:-2], plain[:-2], strict=True):
        close(found, right, dtype)
    step = max(torch.finfo(dtype).eps, TOLERANCE[dtype])  # the plain form rounds a low gradient of the weight twice
    for found, right in zip(ours[-2:], plain[-2:], strict=True):
        torch.testing.assert_close(
            found, right, rtol=2 * step, atol=step * float(right.abs().max()) if right.numel() else 0
        )
    return ours


@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_the_references(case: str, cut: None) -> None:
    sets, vocab, width = CASES[case]
    check_all(*matrices(sets.num_positions, vocab, width, torch.float32), sets.local(VocabShard(0, vocab)))


def aimed(sets: CandidateSets, vocab: int, dtype: torch.dtype = torch.float32) -> LocalSets:
    """The sets with random targets, as the operators take them."""
    gen = torch.Generator().manual_seed(2)
    y = torch.rand(len(sets.ids), generator=gen, dtype=torch.float64)
    return sets.local(VocabShard(0, vocab), targets=y.to(accumulator(dtype)))


@pytest.mark.parametrize("case", CASES)
def test_every_operator_with_targets_is_the_references(case: str, cut: None) -> None:
    sets, vocab, width = CASES[case]
    check_all(*matrices(sets.num_positions, vocab, width, torch.float32), aimed(sets, vocab))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cut", [8], indirect=True)
@pytest.mark.parametrize("soft", [False, True])
def test_other_dtypes(dtype: torch.dtype, soft: bool, cut: None) -> None:
    sets, vocab, width = CASES["tied"]
    here = aimed(sets, vocab, dtype) if soft else sets.local(VocabShard(0, vocab))
    check_all(*matrices(sets.num_positions, vocab, width, dtype), here)


def test_targets_at_gold_alone_are_the_hard_statistics(cut: None) -> None:
    sets, vocab, width = CASES["zipf"]
    hidden, weight = matrices(sets.num_positions, vocab, width, torch.float32)
    here = sets.local(VocabShard(0, vocab))
    table, at_gold = (here.offsets, here.columns, here.gold), torch.zeros(len(here.columns))
    at_gold[here.gold] = 1
    hard = OURS.restricted_fwd(hidden, weight, *table, True)
    soft = OURS.restricted_fwd(hidden, weight, *table, True, at_gold)
    assert all(map(torch.equal, hard[:3], soft[:3])) and torch.equal(soft[3], weight[here.columns[here.gold]])


def test_the_same_bits_again_and_for_a_position_alone(cut: None) -> None:
    sets, vocab, width = CASES["zipf"]
    hidden, weight = matrices(sets.num_positions, vocab, width, torch.float32)
    here = sets.local(VocabShard(0, vocab))
    first, again = (check_all(hidden, weight, here) for _ in range(2))
    assert all(map(torch.equal, first, again))
    begin, end = here.offsets[4:6]
    alone = LocalSets(here.offsets[4:6] - begin, here.columns[begin:end], here.gold[4:5] - begin)
    z, stats, mixture, _ = OURS.restricted_fwd(hidden[4:5], weight, alone.offsets, alone.columns, alone.gold, True)
    assert (
        torch.equal(z, first[0][begin:end])
        and torch.equal(stats, first[1][:, 4:5])
        and torch.equal(mixture, first[2][4:5])
    )


def test_sets_of_the_cap() -> None:
    hidden, weight = matrices(2, 201, 48, torch.float32)
    here = CandidateSets.from_lists([range(201)] * 2, [200, 20]).local(VocabShard(0, 201))
    table = (here.offsets, here.columns, here.gold)
    found, wanted = (ops.restricted_fwd(hidden, weight, *table, True) for ops in (OURS, PLAIN))
    entries = ByColumn.of(here.offsets, here.columns).entries(wanted[0])
    rows = [ops.restricted_bwd_rows(hidden, *entries) for ops in (OURS, PLAIN)]
    for ours, plain in zip((*found, rows[0]), (*wanted, rows[1]), strict=True):
        close(ours, plain, torch.float32)


def test_without_the_mixture(cut: None) -> None:
    sets, vocab, width = CASES["zipf"]
    hidden, weight = matrices(sets.num_positions, vocab, width, torch.float32)
    for here in (sets.local(VocabShard(0, vocab)), aimed(sets, vocab)):
        with_it, without = (
            OURS.restricted_fwd(hidden, weight, here.offsets, here.columns, here.gold, mix, here.targets)
            for mix in (True, False)
        )
        assert torch.equal(with_it[0], without[0]) and torch.equal(with_it[1], without[1])
        assert without[2].shape == without[3].shape == (0, width)


@pytest.mark.parametrize("shard", [(0, 12), (12, 14), (40, 40), (2, 30)])
def test_a_shard_that_lacks_candidates_or_the_gold_id(shard: tuple[int, int], cut: None) -> None:
    sets, _, width = CASES["zipf"]
    hidden, weight = matrices(sets.num_positions, shard[1] - shard[0], width, torch.float32)
    here = sets.local(VocabShard(*shard, group=object()))  # type: ignore[arg-type]
    assert here.gold.lt(0).any()
    stats = check_all(hidden, weight, here)[1]
    empty = here.offsets.diff() == 0
    assert stats[0, empty].eq(-3e38).all() and stats[1:, empty].eq(0).all() and stats.isfinite().all()


def results(hidden: Tensor, weight: Tensor, sets: CandidateSets, mode: str, **options: bool) -> tuple[Tensor, ...]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = restricted_linear_cross_entropy(hidden, weight, sets, kernels=mode, **options)  # type: ignore[arg-type]
    (loss * torch.linspace(0.5, 1, len(loss), dtype=loss.dtype)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad.to_dense()


@pytest.fixture
def ours_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes Triton's kernels, as for CUDA tensors."""
    monkeypatch.setattr(restricted_loss, "choose", lambda mode: OURS if mode == "auto" else PLAIN)


@dtypes
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("cut", [8], indirect=True)
def test_the_loss_and_its_gradients_are_the_references(
    dtype: torch.dtype, sparse: bool, cut: None, ours_live: None
) -> None:
    sets, vocab, width = CASES["zipf"]
    hidden, weight = matrices(sets.num_positions, vocab, width, dtype)
    for ours, plain in zip(
        results(hidden, weight, sets, "auto", sparse=sparse), results(hidden, weight, sets, "reference"), strict=True
    ):
        torch.testing.assert_close(
            ours, plain, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=20 * TOLERANCE[dtype]
        )


@dtypes
@pytest.mark.parametrize("cut", [8], indirect=True)
def test_the_loss_from_logits_and_its_gradient_are_the_references(
    dtype: torch.dtype, cut: None, ours_live: None
) -> None:
    sets, vocab, _ = CASES["zipf"]
    whole = torch.randn(sets.num_positions, 2 * vocab, generator=torch.Generator().manual_seed(3)).to(dtype)
    for logits in (whole[:, :vocab], whole[:, ::2], whole[:, vocab:].t().contiguous().t()):
        found = []
        for mode in ("auto", "reference"):
            leaf = logits.detach().requires_grad_()
            loss = restricted_cross_entropy(leaf, sets, kernels=mode)
            factors = torch.linspace(0.5, 1, len(loss), dtype=loss.dtype)
            found.append((loss.detach(), *torch.autograd.grad((loss * factors).sum(), leaf)))
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(
                ours, plain, rtol=1e-2 if ours.dtype == torch.bfloat16 else 1e-5, atol=20 * TOLERANCE[dtype]
            )


def test_gradcheck(ours_live: None) -> None:
    hidden, weight = (t.requires_grad_() for t in matrices(2, 6, 2, torch.float64))
    sets = CandidateSets.from_lists([[0, 2, 5], [2, 3]], [5, 2])
    assert torch.autograd.gradcheck(lambda h, w: restricted_linear_cross_entropy(h, w, sets), (hidden, weight))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: restricted_cross_entropy(z, sets), (logits,))


def test_a_set_of_65535_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "SPLIT", 4096)
    hidden, weight = matrices(2, 65_600, 4, torch.float32)
    here = CandidateSets.from_lists([range(65_535), [7, 65_599]], [65_534, 7]).local(VocabShard(0, 65_600))
    table = (here.offsets, here.columns, here.gold)
    exact = PLAIN.restricted_fwd(hidden.double(), weight.double(), *table, True)
    for ours, right in zip(OURS.restricted_fwd(hidden, weight, *table, True)[:3], exact[:3], strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm()
    logits, scalars = (hidden @ weight.t()), torch.tensor([[1.0, 2.0], [0.5, 0.25], [1.0, 0.1]])
    results = []
    for ops, kind in ((OURS, torch.float32), (PLAIN, torch.float64)):
        z, stats = ops.restricted_logits_fwd(logits.to(kind), *table)
        grad = torch.zeros_like(logits, dtype=kind)
        ops.restricted_logits_bwd(z, *table, scalars.to(kind), grad)
        results.append((z, stats, grad))
    for ours, right in zip(*results, strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm()


def test_an_id_of_65535_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "SPLIT", 4096)
    hidden = matrices(65_535, 1, 4, torch.float32)[0]
    columns = torch.full((65_535,), 2, dtype=torch.int32)
    columns[40_000:40_003] = torch.tensor([0, 5, 0], dtype=torch.int32)
    *table, factors = ByColumn.of(torch.arange(65_536), columns).entries(torch.linspace(-1, 1, 65_535))
    rows = OURS.restricted_bwd_rows(hidden, *table, factors)
    exact = PLAIN.restricted_bwd_rows(hidden.double(), *table, factors.double())
    assert table[0].tolist() == [0, 2, 5] and (rows.double() - exact).norm() <= 1e-6 * exact.norm()


def test_tensors_that_are_not_contiguous() -> None:
    sets, vocab, width = CASES["tied"]
    hidden, weight = matrices(sets.num_positions, vocab, width, torch.float32)
    here = sets.local(VocabShard(0, vocab))
    wanted = check_all(hidden, weight, here)
    turned = check_all(hidden.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :width], here)
    assert all(map(torch.equal, wanted[:3], turned[:3]))
    grads = [
        torch.ones(weight.shape),
        torch.ones(weight.shape).t().contiguous().t(),
        torch.ones(vocab, 2 * width)[:, ::2],
    ]
    for grad in grads:
        OURS.restricted_bwd_dw(hidden, *ByColumn.of(here.offsets, here.columns).entries(wanted[0]), grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_a_gradient_of_another_dtype(kept: torch.dtype) -> None:
    sets, vocab, width = CASES["tied"]
    hidden, _ = matrices(sets.num_positions, vocab, width, torch.float32)
    here = sets.local(VocabShard(0, vocab))
    grads = [torch.ones(vocab, width, dtype=kept) for _ in range(2)]
    for ops, grad in zip((OURS, PLAIN), grads, strict=True):
        entries = ByColumn.of(here.offsets, here.columns).entries(torch.linspace(-1, 1, len(here.columns)))
        ops.restricted_bwd_dw(hidden, *entries, grad)
    torch.testing.assert_close(*grads, rtol=0, atol=2 * max(torch.finfo(kept).eps, 1e-6) * float(grads[1].abs().max()))


def test_logits_without_bounds(ours_live: None) -> None:
    hidden, weight = torch.ones(2, 16), torch.zeros(40, 16)
    weight[3], weight[20] = 1e4, -1e4
    sets = CandidateSets.from_lists([range(40), [20, 3]], [3, 20])
    loss, dh, dw = results(hidden, weight, sets, "auto")
    assert loss.tolist() == [0.0, 320_000.0] and dh.isfinite().all() and dw.isfinite().all()
    weight[5, 0] = torch.nan
    assert restricted_linear_cross_entropy(hidden, weight, sets).isnan().tolist() == [True, False]


def test_what_does_not_fit_is_an_error() -> None:
    sets, vocab, width = CASES["random"]
    hidden, weight = matrices(sets.num_positions, vocab, width, torch.float32)
    here = sets.local(VocabShard(0, vocab))
    offsets, columns, gold = here.offsets, here.columns, here.gold
    fwd, dw, of_logits, bwd = (
        OURS.restricted_fwd,
        OURS.restricted_bwd_dw,
        OURS.restricted_logits_fwd,
        OURS.restricted_logits_bwd,
    )
    touched, begins, tokens, factors = ByColumn.of(offsets, columns).entries(torch.zeros(len(columns)))
    grad = torch.zeros_like(weight)
    logits, scalars = torch.zeros(len(hidden), vocab), torch.zeros(3, len(hidden))
    beyond = "points outside"
    for match, call in {
        f"{beyond} the 9 rows": lambda: fwd(hidden, weight[:9], offsets, columns, gold, True),
        beyond: lambda: fwd(hidden, weight, offsets, columns - 300, gold, True),
        f"fwd.*{beyond}": lambda: fwd(hidden, weight, offsets.flip(0), columns, gold, True),
        f"restricted_fwd: .*{beyond}": lambda: fwd(hidden, weight, offsets, columns, gold + 10_000, True),
        f"bwd_dh.*{beyond}": lambda: OURS.restricted_bwd_dh(
            hidden.clone(), weight[:9], columns, gold, torch.ones(2, 5)
        ),
        f"bwd_dw.*{beyond} the 9 rows": lambda: dw(hidden, touched, begins, tokens, factors, grad[:9]),
        f"bwd_dw: .*{beyond}": lambda: dw(hidden, touched.flip(0), begins, tokens, factors, grad),
        f"bwd_rows.*{beyond}": lambda: OURS.restricted_bwd_rows(hidden, touched, begins.flip(0), tokens, factors),
        f"bwd_rows.*{beyond} .* or 3 positions": lambda: OURS.restricted_bwd_rows(
            hidden[:3], touched, begins, tokens, factors
        ),
        "tokens must be contiguous": lambda: dw(hidden, touched, begins, tokens.long(), factors, grad),
        "offsets must be contiguous": lambda: fwd(hidden, weight, offsets.int(), columns, gold, True),
        "columns must be contiguous": lambda: fwd(hidden, weight, offsets, columns.long(), gold, True),
        "gold must be contiguous": lambda: fwd(hidden, weight, offsets, columns, gold[:2], True),
        "hidden is .*float64.*, weight .*float32": lambda: fwd(hidden.double(), weight, offsets, columns, gold, True),
        "kernels=reference takes others": lambda: fwd(hidden.int(), weight.int(), offsets, columns, gold, True),
        r"offsets must be contiguous \[5\]": lambda: fwd(hidden[:4], weight, offsets, columns, gold, True),
        "hidden must be a matrix": lambda: fwd(hidden[0], weight, offsets, columns, gold, True),
        "scale must be contiguous": lambda: OURS.restricted_bwd_dh(
            hidden.clone(), weight, columns, gold, torch.ones(5, 2).t()
        ),
        "coefficient must be": lambda: dw(hidden, touched, begins, tokens, factors[:3], grad),
        f"logits_fwd.*{beyond} the 9 rows": lambda: of_logits(logits[:, :9], offsets, columns, gold),
        f"logits_bwd.*{beyond}": lambda: bwd(factors, offsets, columns, gold + 10_000, scalars, logits),
        "restricted_logits_fwd: gold must be contiguous": lambda: of_logits(logits, offsets, columns, gold.int()),
        "logits must be a matrix": lambda: of_logits(logits[0], offsets, columns, gold),
        "logits is torch.int32; .*kernels=reference takes others": lambda: of_logits(
            logits.int(), offsets, columns, gold
        ),
        "restricted_fwd: targets must be contiguous": lambda: fwd(
            hidden, weight, offsets, columns, gold, True, factors[1:]
        ),
        "logits_fwd: targets must be contiguous": lambda: of_logits(logits, offsets, columns, gold, factors.double()),
        "logits_bwd: targets must be contiguous": lambda: bwd(
            factors, offsets, columns, gold, scalars, logits, factors[:1].expand(len(factors))
        ),
        "target_mixture must be contiguous": lambda: OURS.restricted_bwd_dh(
            hidden.clone(), weight, columns, gold, torch.ones(2, 5), hidden[:4]
        ),
        "z must be contiguous": lambda: bwd(factors.double(), offsets, columns, gold, scalars, logits),
        "scalars must be contiguous": lambda: bwd(factors, offsets, columns, gold, scalars[:2], logits),
        "grad_weight is": lambda: dw(hidden, touched, begins, tokens, factors, grad[:, :3]),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call()
