"""The restricted loss against autograd in float64: identities, degenerate sets, dtypes, bounded memory, and the
operators' schemas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import outside_mass, restricted_loss
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_replay.errors import ConfigError, DataError, LayoutError
from megatron_replay.kernels import torch_twins
from megatron_replay.kernels.library import choose, live
from megatron_replay.kernels.schemas import OPERATORS
from megatron_replay.ops import (
    CandidateSets,
    VocabShard,
    dynamic_topk,
    restricted_cross_entropy,
    restricted_linear_cross_entropy,
    restricted_linear_terms,
)
from megatron_replay.ops.local_sets import ByColumn


def problem(
    n: int, v: int, h: int, seed: int = 0, tau: float = 0.9, k_max: int = 12
) -> tuple[Tensor, Tensor, CandidateSets]:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(n, h, generator=g, dtype=torch.float64),
        torch.randn(v, h, generator=g, dtype=torch.float64),
    )
    sets = dynamic_topk(hidden @ weight.t(), torch.randint(v, (n,), generator=g), tau, k_max)
    drift = torch.randn(v, h, generator=g, dtype=torch.float64) * 0.1  # the model has moved since Stage 0
    return hidden.requires_grad_(), (weight + drift).requires_grad_(), sets


def formula(logits: Tensor, sets: CandidateSets, targets: Tensor, weights: Tensor) -> Tensor:
    """w (logsumexp_S z - sum_S y z), [N], written down literally from logits [N, V]."""
    found = [
        w * (row[ids.long()].logsumexp(0) - (y * row[ids.long()]).sum())
        for row, ids, y, w in zip(
            logits,
            sets.ids.split(sets.sizes().tolist()),
            targets.split(sets.sizes().tolist()),
            weights,
            strict=True,
        )
    ]
    return torch.stack(found) if found else logits.sum(1)


def soft(sets: CandidateSets, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Targets that sum to 1 at each position, and weights of which every third is 0; float64."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(sets.ids), generator=g, dtype=torch.float64).split(sets.sizes().tolist())
    targets = torch.cat([torch.zeros(0, dtype=torch.float64), *(some / some.sum() for some in drawn)])
    weights = torch.rand(sets.num_positions, generator=g, dtype=torch.float64)
    weights[::3] = 0
    return targets, weights


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 6), st.integers(1, 60), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_targets_and_weights_are_those_of_the_formula(n: int, v: int, h: int, k_max: int, seed: int) -> None:
    hidden, weight, sets = problem(n, v, h, seed, k_max=k_max)
    targets, weights = soft(sets, seed)
    scale = torch.arange(1.0, n + 1, dtype=torch.float64)
    logits = hidden @ weight.t()
    truth = formula(logits, sets, targets, weights)
    wanted = torch.autograd.grad((truth * scale).sum(), (hidden, weight), retain_graph=True)
    here = sets.local(VocabShard(0, v), targets=targets, weights=weights)
    found = [restricted_cross_entropy(logits, here, kernels=mode) for mode in ("auto", "reference")]
    found += [restricted_linear_cross_entropy(hidden, weight, here, kernels=mode) for mode in ("auto", "reference")]
    for loss in found:
        torch.testing.assert_close(loss, truth, atol=1e-12, rtol=1e-12)
        ours = torch.autograd.grad((loss * scale).sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)


def test_gradcheck_with_targets_and_weights() -> None:
    hidden, weight, sets = problem(4, 15, 3)
    targets, weights = soft(sets)
    here = sets.local(VocabShard(0, 15), targets=targets, weights=weights)
    assert torch.autograd.gradcheck(lambda h, w: restricted_linear_terms(h, w, here), (hidden, weight))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: restricted_cross_entropy(z, here), (logits,))


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("aimed", [False, True])
def test_the_log_sum_exp_of_the_set_is_a_second_loss(aimed: bool, mode: str) -> None:
    hidden, weight, sets = problem(7, 40, 5)
    targets, weights = soft(sets)
    logits = hidden @ weight.t()
    each = sets.ids.long().split(sets.sizes().tolist())
    lse = torch.stack([row[ids].logsumexp(0) for row, ids in zip(logits, each, strict=True)])
    loss = formula(logits, sets, targets, weights) if aimed else restricted_loss(logits, sets)
    here = sets.local(VocabShard(0, 40), targets=targets, weights=weights) if aimed else sets
    found = restricted_linear_terms(hidden, weight, here, kernels=mode)
    torch.testing.assert_close(found, (loss, lse), atol=1e-12, rtol=1e-12)
    assert torch.equal(found[0], restricted_linear_cross_entropy(hidden, weight, here, kernels=mode))
    scale = torch.arange(1.0, 8, dtype=torch.float64)
    for of_loss, of_lse in ((1.0, 0.7), (1.0, 0.0), (0.0, 1.0)):
        wanted = torch.autograd.grad(
            (scale * (of_loss * loss + of_lse * lse.square())).sum(), (hidden, weight), retain_graph=True
        )
        total = (scale * (of_loss * found[0] + of_lse * found[1].square())).sum()
        ours = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(ours, wanted, atol=1e-11, rtol=1e-11)
    only = torch.autograd.grad(found[1].sum(), (hidden, weight))
    torch.testing.assert_close(only, torch.autograd.grad(lse.sum(), (hidden, weight)), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("way", ["main_grad", "sparse"])
def test_the_weight_gradient_of_targets_goes_every_way(way: str) -> None:
    hidden, weight, sets = problem(6, 40, 5)
    targets, weights = soft(sets)
    here = sets.local(VocabShard(0, 40), targets=targets, weights=weights)
    (wanted,) = torch.autograd.grad(formula(hidden @ weight.t(), sets, targets, weights).sum(), weight)
    if way == "sparse":
        loss = restricted_linear_cross_entropy(hidden, weight, here, sparse=True)
        (rows,) = torch.autograd.grad(loss.sum(), weight)
        assert rows.is_sparse
        found = rows.to_dense()
    else:
        found = torch.ones(40, 5, dtype=torch.float64)
        restricted_linear_cross_entropy(hidden, weight, here, main_grad=found).sum().backward()
        found -= 1
        assert weight.grad is None
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_on_gold_alone_are_the_hard_loss(dtype: torch.dtype) -> None:
    hidden, weight, sets = problem(20, 60, 8)
    hidden, weight = ((t.detach() * 0.3).to(dtype).requires_grad_() for t in (hidden, weight))
    at_gold = torch.zeros(len(sets.ids)).index_fill_(0, sets.offsets[:-1] + sets.gold_slot, 1)
    aimed = sets.local(VocabShard(0, 60), targets=at_gold, weights=torch.ones(20))
    answers = []
    for some in (sets, aimed):
        loss = restricted_linear_cross_entropy(hidden, weight, some)
        answers.append([loss, *torch.autograd.grad(loss.sum(), (hidden, weight))])
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for ours, theirs in zip(*answers, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_targets_of_any_layout_and_dtype_are_taken() -> None:
    hidden, weight, sets = problem(6, 40, 5)
    targets, _ = soft(sets)
    losses = [
        restricted_linear_cross_entropy(hidden, weight, sets.local(VocabShard(0, 40), targets=some))
        for some in (targets, targets.repeat_interleave(2)[::2], targets.float(), targets.half())
    ]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(losses[3], losses[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("aimed", [False, True])
def test_backward_may_run_again_over_a_retained_graph(aimed: bool) -> None:
    hidden, weight, sets = problem(6, 40, 5)
    here = sets.local(VocabShard(0, 40), targets=soft(sets)[0] if aimed else None)
    loss, lse = restricted_linear_terms(hidden, weight, here)
    total = (loss + 0.5 * lse).sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(total, (hidden, weight))))


def test_positions_of_weight_0_count_nothing_and_of_weight_1_all() -> None:
    hidden, weight, sets = problem(6, 40, 5)
    hard = restricted_linear_cross_entropy(hidden, weight, sets)
    kept = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    loss = restricted_linear_cross_entropy(hidden, weight, sets.local(VocabShard(0, 40), weights=kept))
    assert torch.equal(loss, hard * kept)
    for ours, theirs in zip(
        torch.autograd.grad(loss.sum(), (hidden, weight)),
        torch.autograd.grad(hard[kept > 0].sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=0)


def test_targets_and_weights_follow_the_sets() -> None:
    _, _, sets = problem(5, 40, 4)
    targets, weights = soft(sets)
    lower, upper = (
        sets.local(VocabShard(start, start + 20, group=object()), targets=targets, weights=weights)  # type: ignore[arg-type]
        for start in (0, 20)
    )
    assert lower.targets is not None and upper.targets is not None
    assert len(lower.targets) == len(lower.columns) and len(upper.targets) == len(upper.columns)
    for t in range(5):
        parts = [some.targets[some.offsets[t] : some.offsets[t + 1]] for some in (lower, upper)]  # type: ignore[index]
        assert torch.equal(torch.cat(parts), targets[sets.offsets[t] : sets.offsets[t + 1]])
    moved = lower.indexed().to("cpu")
    assert moved.targets is not None and torch.equal(moved.targets, lower.targets) and moved.by_column is not None
    assert moved.weights is weights
    bare = sets.local(VocabShard(0, 40)).indexed().to("cpu")
    assert bare.targets is None and bare.weights is None
    with pytest.raises(DataError, match=r"targets has shape \(3,\), but there are 5 positions"):
        sets.local(VocabShard(0, 40), targets=torch.ones(3))
    with pytest.raises(DataError, match=r"weights has shape \(4,\), but there are 5 positions"):
        sets.local(VocabShard(0, 40), weights=torch.ones(4))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 6), st.integers(1, 60), st.integers(1, 9), st.integers(1, 70), st.integers(0, 99))
def test_loss_and_gradients_are_those_of_autograd(n: int, v: int, h: int, k_max: int, seed: int) -> None:
    hidden, weight, sets = problem(n, v, h, seed, k_max=k_max)
    scale = torch.arange(1.0, n + 1, dtype=torch.float64)
    truth = restricted_loss(hidden @ weight.t(), sets)
    wanted = torch.autograd.grad((truth * scale).sum(), (hidden, weight))
    logits = hidden @ weight.t()
    from_logits = [restricted_cross_entropy(logits, sets, kernels=mode) for mode in ("auto", "reference")]
    for loss in (restricted_linear_cross_entropy(hidden, weight, sets), *from_logits):
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, truth, atol=1e-12, rtol=1e-12)
        found = torch.autograd.grad((loss * scale).sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, sets = problem(4, 15, 3)
    assert torch.autograd.gradcheck(lambda h, w: restricted_linear_cross_entropy(h, w, sets), (hidden, weight))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    for mode in ("auto", "reference"):
        assert torch.autograd.gradcheck(lambda z, mode=mode: restricted_cross_entropy(z, sets, kernels=mode), (logits,))


def test_the_gradient_error_is_twice_the_outside_mass() -> None:
    """Proposition 1: the L1 distance between the restricted and the full gradient in the logits is 2 rho."""
    g = torch.Generator().manual_seed(3)
    logits = (torch.randn(20, 300, generator=g, dtype=torch.float64) * 2).requires_grad_()
    gold = torch.randint(300, (20,), generator=g)
    sets = dynamic_topk(logits, gold, tau=0.8, k_max=60)
    (ours,) = torch.autograd.grad(restricted_cross_entropy(logits, sets).sum(), logits)
    (full,) = torch.autograd.grad(cross_entropy(logits, gold, reduction="sum"), logits)
    rho = outside_mass(logits.detach(), sets)
    assert rho.min() > 0.01
    torch.testing.assert_close((ours - full).abs().sum(1), 2 * rho, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(sets.outside_mass.double(), rho, atol=1e-7, rtol=0)


def test_the_whole_vocabulary_is_ordinary_cross_entropy() -> None:
    hidden, weight, _ = problem(5, 33, 4)
    gold = torch.tensor([0, 32, 7, 7, 1])
    sets = CandidateSets.from_lists([range(33)] * 5, gold.tolist())
    truth = cross_entropy(hidden @ weight.t(), gold, reduction="none")
    torch.testing.assert_close(restricted_linear_cross_entropy(hidden, weight, sets), truth, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(restricted_cross_entropy(hidden @ weight.t(), sets), truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_set_of_one_has_no_loss_and_no_gradient(dtype: torch.dtype) -> None:
    hidden, weight = (torch.randn(s, 5).mul_(30).to(dtype).requires_grad_() for s in (3, 20))
    loss = restricted_linear_cross_entropy(hidden, weight, CandidateSets.from_lists([[4], [19], [0]], [4, 19, 0]))
    loss.sum().backward()
    for tensor in (loss, hidden.grad, weight.grad):
        assert tensor is not None
        assert not tensor.detach().any()


def test_a_rank_without_a_candidate_adds_nothing() -> None:
    hidden, weight, sets = problem(3, 12, 4)
    here = sets.local(VocabShard(12, 12, group=object()))  # type: ignore[arg-type]
    z, stats, mixture, _ = torch_twins.restricted_fwd(
        hidden.detach(), weight.detach()[:0], here.offsets, here.columns, here.gold, True
    )
    assert z.shape == (0,)
    assert mixture.shape == (3, 4) and not mixture.any()
    assert stats.tolist() == [[-3e38] * 3, [0.0] * 3, [0.0] * 3]
    shard = VocabShard(0, 4, group=object())  # type: ignore[arg-type]
    some = CandidateSets.from_lists([[1, 2], [8, 9]], [2, 8]).local(shard)
    _, stats, *_ = torch_twins.restricted_fwd(
        hidden.detach()[:2], weight.detach()[:4], some.offsets, some.columns, some.gold, False
    )
    assert stats[:, 1].tolist() == [-3e38, 0.0, 0.0]
    assert stats[1, 0] >= 1
    assert stats.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_lower_precision_inputs_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, sets = problem(40, 300, 64, k_max=50)
    hidden, weight = ((t.detach() * 0.2).to(dtype).requires_grad_() for t in (hidden, weight))
    loss = restricted_linear_cross_entropy(hidden, weight, sets)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = restricted_loss(exact[0] @ exact[1].t(), sets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, atol=2e-6, rtol=1e-6)
    loss.sum().backward()
    truth.sum().backward()
    for ours, right in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and right.grad is not None and ours.grad.dtype == dtype
        assert (ours.grad.double() - right.grad).norm() <= tolerance * right.grad.norm()


def test_small_pieces_of_gathered_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, sets = problem(9, 50, 6)

    def run() -> tuple[Tensor, ...]:
        loss = restricted_linear_cross_entropy(hidden, weight, sets, kernels="reference")
        return (loss, *torch.autograd.grad(loss.sum(), (hidden, weight)))

    whole = run()
    monkeypatch.setattr(torch_twins, "GATHER_BYTES", 700)
    in_pieces = run()
    monkeypatch.setattr(torch_twins, "_has_bag", lambda weight: False)
    gathered = run()
    for other in (in_pieces, gathered):
        torch.testing.assert_close(other, whole, atol=1e-12, rtol=1e-12)


def test_the_weight_gradient_can_go_into_the_main_gradient() -> None:
    hidden, weight, sets = problem(6, 40, 5)
    (wanted,) = torch.autograd.grad(restricted_linear_cross_entropy(hidden, weight, sets).sum(), weight)
    main = torch.ones(40, 5)
    single_hidden, single_weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    restricted_linear_cross_entropy(single_hidden, single_weight, sets, main_grad=main).sum().backward()
    assert single_weight.grad is None
    torch.testing.assert_close(main - 1, wanted.float(), atol=1e-5, rtol=1e-5)


def test_the_weight_gradient_can_be_its_touched_rows() -> None:
    hidden, weight, sets = problem(6, 40, 5)
    (wanted,) = torch.autograd.grad(restricted_linear_cross_entropy(hidden, weight, sets).sum(), weight)
    (rows,) = torch.autograd.grad(restricted_linear_cross_entropy(hidden, weight, sets, sparse=True).sum(), weight)
    assert rows.is_sparse and rows.is_coalesced()
    assert rows.indices()[0].tolist() == sorted(set(sets.ids.tolist()))
    assert torch.equal(rows.to_dense(), wanted)


@pytest.mark.parametrize("ahead", [False, True])
def test_sets_may_be_prepared_for_the_shard(ahead: bool) -> None:
    hidden, weight, sets = problem(6, 40, 5)
    prepared = sets.local(VocabShard(0, 40))
    prepared = prepared.indexed() if ahead else prepared
    wanted, found = (restricted_linear_cross_entropy(hidden, weight, some) for some in (sets, prepared))
    assert torch.equal(wanted, found)
    logits = hidden @ weight.t()
    assert torch.equal(restricted_cross_entropy(logits, sets), restricted_cross_entropy(logits, prepared))
    assert all(map(torch.equal, *(torch.autograd.grad(loss.sum(), (hidden, weight)) for loss in (wanted, found))))
    with pytest.raises(DataError, match="6 candidate sets for 5 rows"):
        restricted_linear_cross_entropy(hidden[:5], weight, prepared)


def test_a_frozen_weight_or_hidden_needs_no_gradient() -> None:
    hidden, weight, sets = problem(3, 20, 4)
    restricted_linear_cross_entropy(hidden, weight.detach(), sets).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    restricted_linear_cross_entropy(hidden.detach(), weight, sets).sum().backward()
    assert weight.grad is not None
    hot = hidden.detach().float(), weight.detach().float()
    torch.testing.assert_close(
        restricted_linear_cross_entropy(*hot, sets).sum(), restricted_loss(hot[0] @ hot[1].t(), sets).sum()
    )


def test_untouched_rows_get_no_gradient_and_strided_inputs_are_fine() -> None:
    hidden, weight, sets = problem(4, 30, 6, k_max=3)
    loss = restricted_linear_cross_entropy(
        hidden.detach().t().contiguous().t(), weight.detach().t().contiguous().t(), sets
    )
    torch.testing.assert_close(loss, restricted_linear_cross_entropy(hidden, weight, sets).detach())
    restricted_linear_cross_entropy(hidden, weight, sets).sum().backward()
    assert weight.grad is not None
    untouched = sorted(set(range(30)) - set(sets.ids.tolist()))
    assert untouched and not weight.grad[untouched].any()


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, sets = problem(3, 20, 4)
    with pytest.raises(DataError, match="3 candidate sets for 2 rows"):
        restricted_linear_cross_entropy(hidden[:2], weight, sets)
    with pytest.raises(DataError, match=r"candidate id 99 lies outside the vocabulary rows 0\.\.20"):
        restricted_linear_cross_entropy(hidden[:1], weight, CandidateSets.from_lists([[3, 99]], [3]))
    with pytest.raises(LayoutError):
        restricted_linear_cross_entropy(hidden, weight, sets, VocabShard(0, 21))
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        restricted_linear_cross_entropy(hidden, weight, sets, kernels="referenze")
    logits = (hidden @ weight.t()).detach()
    with pytest.raises(DataError, match="3 candidate sets for 2 rows"):
        restricted_cross_entropy(logits[:2], sets)
    with pytest.raises(DataError, match=r"candidate id 99 lies outside the vocabulary rows 0\.\.20"):
        restricted_cross_entropy(logits[:1], CandidateSets.from_lists([[3, 99]], [3]))
    with pytest.raises(LayoutError):
        restricted_cross_entropy(logits, sets, VocabShard(0, 21))
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        restricted_cross_entropy(logits, sets, kernels="referenze")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operators_keep_to_their_schemas(dtype: torch.dtype) -> None:
    hidden, weight, sets = problem(5, 40, 6)
    hidden, weight, here = hidden.detach().to(dtype), weight.detach().to(dtype), sets.local(VocabShard(0, 40))
    ops = torch.ops.megatron_replay
    z, stats, mixture, _ = ops.restricted_fwd(hidden, weight, here.offsets, here.columns, here.gold, True)
    y, gradient = torch.rand_like(z), torch.zeros_like(hidden @ weight.t())
    entries = ByColumn.of(here.offsets, here.columns).entries(z)
    for op, args in (
        (ops.restricted_fwd, (hidden, weight, here.offsets, here.columns, here.gold, True)),
        (ops.restricted_fwd, (hidden, weight, here.offsets, here.columns, here.gold, False)),
        (ops.restricted_fwd, (hidden, weight, here.offsets, here.columns, here.gold, True, y)),
        (ops.restricted_fwd, (hidden, weight, here.offsets, here.columns, here.gold, False, y)),
        (ops.restricted_bwd_dh, (mixture, weight, here.columns, here.gold, stats[:2].contiguous())),
        (ops.restricted_bwd_dh, (mixture, weight, here.columns, here.gold, stats[:2].contiguous(), mixture.clone())),
        (ops.restricted_bwd_dw, (hidden, *entries, torch.zeros_like(weight))),
        (ops.restricted_bwd_rows, (hidden, *entries)),
        (ops.restricted_logits_fwd, (hidden @ weight.t(), here.offsets, here.columns, here.gold)),
        (ops.restricted_logits_fwd, (hidden @ weight.t(), here.offsets, here.columns, here.gold, y)),
        (ops.restricted_logits_bwd, (z, here.offsets, here.columns, here.gold, stats, gradient)),
        (ops.restricted_logits_bwd, (z, here.offsets, here.columns, here.gold, stats, gradient, y)),
        (ops.topk_rows, (hidden @ weight.t(), 7)),
    ):
        torch.library.opcheck(op.default, args)


def test_doctor_can_ask_which_kernel_is_live() -> None:
    assert live("cpu", "reference") == dict.fromkeys(OPERATORS, "reference")
    assert set(live()) == set(OPERATORS)
    assert set(live().values()) <= {"reference", "compiled"}
    assert live("npu", "auto").keys() == OPERATORS.keys()
    assert choose("reference").topk_rows is torch_twins.topk_rows
