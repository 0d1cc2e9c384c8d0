"""The compiled loss from logits against the plain one, at its edges.

Threads and instruction sets must not change a bit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_replay.kernels.library import choose
from megatron_replay.kernels.precision import accumulator
from megatron_replay.ops import CandidateSets, VocabShard, restricted_cross_entropy
from megatron_replay.ops.local_sets import LocalSets

pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-13}
STEP = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float64: 1e-13}
"""Tolerance of a gradient, which is rounded to the logits' dtype."""
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OURS, PLAIN = choose("auto"), choose("reference")
ELSEWHERE = object()
"""Stands for a group whose other ranks hold the candidates that are not here; no collective is called."""

CASES = {
    "random": ([1, 2, 3, 5, 8, 9, 13, 40, 64, 65], 300),
    "one": ([1] * 70, 20),
    "cap": ([201] * 7, 400),
    "odd vocabulary": ([7, 30, 12] * 23, 51),
    "whole vocabulary": ([50, 50], 50),
    "no positions": ([], 50),
    "one position": ([11], 50),
}


def problem(case: str, dtype: torch.dtype, zipf: bool = False) -> tuple[Tensor, CandidateSets]:
    """Logits [N, V], and sets of those sizes; by Zipf's law the low ids are in most of them."""
    sizes, vocab = CASES[case]
    gen = torch.Generator().manual_seed(5)
    odds = 1 / torch.arange(1.0, vocab + 1) if zipf else torch.ones(vocab)
    rows = [torch.multinomial(odds, size, generator=gen).tolist() for size in sizes]
    logits = (4 * torch.randn(len(sizes), vocab, generator=gen, dtype=torch.float64)).to(dtype)
    return logits, CandidateSets.from_lists(rows, [row[t % len(row)] for t, row in enumerate(rows)])


def close(ours: Tensor, plain: Tensor, tolerance: float) -> None:
    assert ours.dtype == plain.dtype and ours.shape == plain.shape
    scale = float(plain.abs().max()) if plain.numel() else 0.0
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * scale)


def check(logits: Tensor, here: LocalSets) -> tuple[Tensor, Tensor, Tensor]:
    """Both operators equal the plain ones; z, statistics and gradient of ours."""
    table = (here.offsets, here.columns, here.gold)
    (z, stats), (right, right_stats) = (
        ops.restricted_logits_fwd(logits, *table, here.targets) for ops in (OURS, PLAIN)
    )
    assert torch.equal(z, right) and z.dtype == right.dtype
    close(stats, right_stats, TOLERANCE[logits.dtype])
    assert torch.equal(stats[0], right_stats[0])
    assert here.targets is not None or torch.equal(stats[2], right_stats[2])
    factors = torch.linspace(0.25, 1, 2 * len(here.gold), dtype=z.dtype).view(2, -1)
    scalars, before = torch.stack([right_stats[0] + 0.5, *factors]), torch.full(logits.shape, 0.375, dtype=logits.dtype)
    grad, right_grad = before.clone(), before.clone()
    OURS.restricted_logits_bwd(z, *table, scalars, grad, here.targets)
    PLAIN.restricted_logits_bwd(z, *table, scalars, right_grad, here.targets)
    close(grad, right_grad, STEP[logits.dtype])
    untouched = torch.ones(logits.shape, dtype=torch.bool)
    untouched[torch.arange(len(here.gold)).repeat_interleave(here.offsets.diff()), here.columns.long()] = False
    assert torch.equal(grad[untouched], before[untouched])
    return z, stats, grad


def loss_and_gradient(logits: Tensor, sets: CandidateSets | LocalSets, mode: str = "auto") -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = restricted_cross_entropy(leaf, sets, kernels=mode)
    (grad,) = torch.autograd.grad((loss * torch.linspace(0.5, 1, len(loss), dtype=loss.dtype)).sum(), leaf)
    return loss.detach(), grad


def aimed(sets: CandidateSets, vocab: int, dtype: torch.dtype) -> LocalSets:
    """The sets with random targets in the dtype of sums; some are 0."""
    y = torch.rand(len(sets.ids), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return sets.local(VocabShard(0, vocab), targets=y.sub_(0.1).clamp_(min=0).to(accumulator(dtype)))


@dtypes
@pytest.mark.parametrize("zipf", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_the_references(case: str, zipf: bool, dtype: torch.dtype) -> None:
    logits, sets = problem(case, dtype, zipf)
    check(logits, sets.local(VocabShard(0, logits.shape[1])))
    check(logits, aimed(sets, logits.shape[1], dtype))


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradient_are_the_references(case: str, dtype: torch.dtype) -> None:
    logits, sets = problem(case, dtype)
    for some in (sets, aimed(sets, logits.shape[1], dtype)):
        (loss, grad), (right, right_grad) = (loss_and_gradient(logits, some, mode) for mode in ("auto", "reference"))
        close(loss, right, 10 * TOLERANCE[dtype])
        close(grad, right_grad, STEP[dtype])


@dtypes
@pytest.mark.parametrize("shard", [(0, 300), (7, 8), (100, 200), (300, 300)])
def test_a_shard_that_lacks_candidates_or_the_gold_id(shard: tuple[int, int], dtype: torch.dtype) -> None:
    logits, sets = problem("random", dtype, zipf=True)
    here = sets.local(VocabShard(*shard, group=ELSEWHERE))  # type: ignore[arg-type]
    _, stats, _ = check(logits[:, slice(*shard)], here)
    empty = here.offsets.diff() == 0
    assert bool(empty.any()) is (shard != (0, 300))
    assert (
        stats[0, empty].eq(torch.tensor(-3e38, dtype=stats.dtype)).all()
        and stats[1:, empty].eq(0).all()
        and stats.isfinite().all()
    )


@dtypes
def test_equal_logits(dtype: torch.dtype) -> None:
    logits, sets = problem("random", dtype)
    logits.fill_(2.5)
    _, stats, _ = check(logits, sets.local(VocabShard(0, 300)))
    assert stats[1].tolist() == sets.sizes().tolist() and stats[0].eq(2.5).all() and stats[2].eq(2.5).all()


@dtypes
def test_a_set_of_one_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    loss, grad = loss_and_gradient(*problem("one", dtype))
    assert not loss.any() and not grad.any()


def test_sets_of_65535_ids() -> None:
    logits = 3 * torch.randn(2, 66_001, generator=torch.Generator().manual_seed(2))
    sets = CandidateSets.from_lists([range(65_535), range(400, 65_935)], [65_534, 400])
    exact = loss_and_gradient(logits.double(), sets, "reference")
    for ours, right in zip(loss_and_gradient(logits, sets), exact, strict=True):
        assert (ours.double() - right).norm() <= 1e-6 * right.norm()


@dtypes
@pytest.mark.parametrize("case", CASES)
def test_threads_and_instruction_sets_give_the_same_bits(
    case: str, dtype: torch.dtype, with_isa: Callable[[str], bool], with_threads: Callable[[int], None]
) -> None:
    logits, sets = problem(case, dtype, zipf=True)
    soft = aimed(sets, logits.shape[1], dtype)
    runs = []
    for isa in ("baseline", "avx2", "avx512"):
        for threads in (1, 2, 3, 5):
            with_threads(threads)
            if with_isa(isa):
                runs.append([*loss_and_gradient(logits, sets), *loss_and_gradient(logits, soft)])
    assert runs and all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@dtypes
def test_tensors_that_are_not_contiguous(dtype: torch.dtype) -> None:
    logits, sets = problem("cap", dtype)
    here = sets.local(VocabShard(0, logits.shape[1]))
    z, stats, _ = check(logits, here)
    for strided in (
        logits.t().contiguous().t(),
        torch.cat([logits, logits], 1)[:, : logits.shape[1]],
        logits.repeat_interleave(2, 1)[:, ::2],
    ):
        assert not strided.is_contiguous()
        ours = check(strided, here)
        assert torch.equal(ours[0], z) and torch.equal(ours[1], stats)
    row = logits[:1].expand(len(logits), -1)
    assert torch.equal(check(row, here)[0], check(row.contiguous(), here)[0])


@dtypes
def test_the_gradient_is_written_into_any_matrix(dtype: torch.dtype) -> None:
    logits, sets = problem("random", dtype)
    here = sets.local(VocabShard(0, 300))
    table = (here.offsets, here.columns, here.gold)
    z, stats = PLAIN.restricted_logits_fwd(logits, *table)
    ones = torch.ones(len(logits), 700, dtype=dtype)
    grads = [ones[:, :300].clone(), ones[:, :300].t().contiguous().t(), ones.clone()[:, 3:303], ones.clone()[:, :600:2]]
    assert [grad.is_contiguous() for grad in grads] == [True, False, False, False]
    for grad in grads:
        OURS.restricted_logits_bwd(z, *table, stats, grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads[1:])


@dtypes
def test_the_whole_vocabulary_is_ordinary_cross_entropy(dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(1)
    logits, gold = (3 * torch.randn(6, 333, generator=gen)).to(dtype), torch.tensor([0, 332, 7, 7, 1, 90])
    wide = logits.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    truth = cross_entropy(wide, gold, reduction="none")
    (grad,) = torch.autograd.grad((truth * torch.linspace(0.5, 1, 6, dtype=wide.dtype)).sum(), wide)
    loss, ours = loss_and_gradient(logits, CandidateSets.from_lists([range(333)] * 6, gold.tolist()))
    close(loss, truth.detach(), 10 * TOLERANCE[dtype])
    close(ours, grad.to(dtype), STEP[dtype])


def test_gradcheck() -> None:
    logits, sets = problem("odd vocabulary", torch.float64)
    some = logits[:3].clone().requires_grad_()
    three = CandidateSets.from_lists(
        [row.tolist() for row in sets.ids[:49].split([7, 30, 12])], sets.gold()[:3].tolist()
    )
    assert torch.autograd.gradcheck(lambda z: restricted_cross_entropy(z, three), (some,))


def test_backward_may_run_again_and_keeps_no_logits() -> None:
    logits, sets = problem("random", torch.float32)
    leaf = logits.requires_grad_()
    loss = restricted_cross_entropy(leaf, sets).sum()
    assert loss.grad_fn is not None
    saved = loss.grad_fn.next_functions[0][0].saved_tensors  # type: ignore[union-attr]
    assert max(tensor.numel() for tensor in saved) <= sets.ids.numel()
    first = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, leaf)[0])


def test_logits_without_bounds() -> None:
    logits = torch.zeros(3, 40)
    logits[:, 3], logits[:, 20], logits[1, 5], logits[2, 7] = 1e4, -1e4, torch.nan, -torch.inf
    sets = CandidateSets.from_lists([range(40), range(40), [7, 3]], [3, 20, 3])
    loss, grad = loss_and_gradient(logits, sets)
    assert loss[0] == 0 and loss[1].isnan() and loss[2] == 0 and grad[[0, 2]].isfinite().all()
