"""Candidate sets against the literal rule: ties, caps, padding, degenerate rows, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import candidate_set, outside_mass
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError, LayoutError
from megatron_replay.kernels.torch_twins import topk_rows
from megatron_replay.ops import VocabShard, dynamic_topk, linear_dynamic_topk


def draw(kind: str, n: int, v: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=g) * 3
    return {
        "float": z,
        "bf16": z.bfloat16(),
        "integer": z.round(),
        "few": z.sign(),
        "double": z.double(),
        "equal": z * 0,
    }[kind]


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["float", "bf16", "integer", "few", "double"]),
    st.integers(0, 5),
    st.integers(1, 700),
    st.floats(0.05, 0.999),
    st.integers(1, 250),
    st.integers(1, 4),
    st.lists(st.integers(0, 699), max_size=3),
    st.integers(0, 99),
)
def test_the_sets_are_those_of_the_literal_rule(
    kind: str, n: int, v: int, tau: float, k_max: int, least: int, always: list[int], seed: int
) -> None:
    logits, gold = draw(kind, n, v, seed), torch.randint(v, (n,), generator=torch.Generator().manual_seed(seed))
    least = min(least, k_max)
    always = [id % v for id in always]
    sets = dynamic_topk(logits, gold, tau, k_max, min_set_size=least, always=always).check(v)
    truth = [
        candidate_set(logits[t], int(gold[t]), tau=tau, k_max=k_max, min_set_size=least, always=always)
        for t in range(n)
    ]
    assert sets.ids.tolist() == [i for row in truth for i in row.ids]
    assert sets.sizes().tolist() == [len(row.ids) for row in truth]
    assert torch.equal(sets.gold(), gold)
    torch.testing.assert_close(
        sets.outside_mass, torch.tensor([max(r.outside_mass, 0.0) for r in truth]), atol=1e-7, rtol=1e-6
    )
    torch.testing.assert_close(sets.lse, torch.logsumexp(logits.double(), 1).float())


@pytest.mark.parametrize("kind", ["float", "integer", "bf16", "few", "equal", "double"])
@pytest.mark.parametrize(("v", "k"), [(20_000, 200), (4097, 3), (999, 40), (7, 7), (130, 200)])
def test_the_top_of_wide_rows_is_that_of_a_stable_sort(kind: str, v: int, k: int) -> None:
    logits = draw(kind, 40, v, 1)
    if kind == "equal":
        logits[::2, ::3] = -0.0
    values, columns, lse = topk_rows(logits, k)
    wide, order = logits.to(values.dtype).sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, order[:, :k])
    assert torch.equal(values, wide[:, :k])
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), 1), atol=1e-13, rtol=1e-14)


def test_chunks_and_dtype_make_no_difference() -> None:
    logits, gold = draw("bf16", 70, 3000, 3), torch.arange(70)
    whole = dynamic_topk(logits, gold, keep_logits=True)
    for other in (
        dynamic_topk(logits.float(), gold),
        dynamic_topk(logits.double(), gold),
        dynamic_topk(logits, gold, kernels="reference"),
    ):
        assert torch.equal(other.ids, whole.ids)
        assert torch.equal(other.offsets, whole.offsets)
    one_by_one = [dynamic_topk(logits[t : t + 1], gold[t : t + 1], keep_logits=True) for t in range(70)]
    from_rows = type(whole).cat(one_by_one)
    for name in ("offsets", "ids", "gold_slot", "lse", "outside_mass", "logits"):
        assert torch.equal(getattr(from_rows, name), getattr(whole, name)), name
    rows = torch.repeat_interleave(torch.arange(70), whole.sizes())
    assert torch.equal(whole.logits, logits[rows, whole.ids.long()].float())


@pytest.mark.parametrize("num", [0, 1, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_linear_head_s_sets_are_those_of_its_logits(num: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(num, 16, generator=g).to(dtype), torch.randn(300, 16, generator=g).to(dtype)
    gold = torch.randint(290, (num,), generator=g)
    options = {"tau": 0.8, "k_max": 20, "vocab_size": 290, "always": (7,), "keep_logits": True, "min_set_size": 2}
    # the product of a row must not depend on its neighbours: whole numbers have no rounding
    hidden, weight = (4 * hidden).round(), weight.sign()
    whole = dynamic_topk(hidden @ weight.t(), gold, **options)
    tiled = linear_dynamic_topk(hidden, weight.requires_grad_(), gold, **options, tile_rows=4)
    for name in ("offsets", "ids", "gold_slot", "logits", "lse", "outside_mass"):
        assert torch.equal(getattr(tiled, name), getattr(whole, name)), name


def test_a_broken_hidden_state_is_named_by_its_row_in_the_call() -> None:
    hidden, weight = torch.ones(9, 4), torch.ones(50, 4)
    hidden[6, 0] = torch.nan
    with pytest.raises(DataError, match=r"row 6 .*NaN"):
        linear_dynamic_topk(hidden, weight, torch.zeros(9, dtype=torch.int64), tile_rows=4)
    with pytest.raises(DataError, match="one gold id a row"):
        linear_dynamic_topk(hidden, weight, torch.zeros(8, dtype=torch.int64))


def test_equal_logits_reach_tau_exactly_and_take_the_lowest_ids() -> None:
    sets = dynamic_topk(torch.zeros(1, 100), torch.tensor([99]), tau=0.95)
    assert sets.ids.tolist() == [*range(95), 99]
    assert dynamic_topk(torch.zeros(1, 4), torch.tensor([0]), tau=0.5).ids.tolist() == [0, 1]
    for v in range(4, 120, 4):  # at 24, 28, 44, ... a float64 running sum of 1/v stays below 3/4 after 3v/4 terms
        assert dynamic_topk(torch.zeros(1, v), torch.tensor([0]), tau=0.75).ids.tolist() == [*range(v * 3 // 4)]


def test_the_cap_leaves_the_gold_id_in_and_reports_the_mass_outside() -> None:
    logits = torch.zeros(2, 50)
    sets = dynamic_topk(logits, torch.tensor([3, 40]), tau=0.9, k_max=10)
    assert sets.sizes().tolist() == [10, 11]
    assert sets.gold_slot.tolist() == [3, 10]
    torch.testing.assert_close(sets.outside_mass, torch.tensor([0.8, 0.78]))
    torch.testing.assert_close(sets.outside_mass.double(), outside_mass(logits, sets), atol=1e-7, rtol=0)


def test_tau_one_and_a_large_cap_keep_the_vocabulary() -> None:
    sets = dynamic_topk(draw("float", 3, 77, 0) * 30, torch.zeros(3, dtype=torch.long), tau=1.0, k_max=1000)
    assert sets.ids.tolist() == [*range(77)] * 3
    assert sets.outside_mass.abs().max() < 1e-12


def test_padding_rows_never_enter() -> None:
    logits = draw("float", 4, 128, 5)
    logits[:, 100:] = 1e6
    gold = torch.tensor([0, 1, 99, 50])
    padded, real = dynamic_topk(logits, gold, vocab_size=100), dynamic_topk(logits[:, :100], gold)
    assert torch.equal(padded.ids, real.ids)
    assert torch.equal(padded.lse, real.lse)
    with pytest.raises(DataError, match="gold id 100 of row 1"):
        dynamic_topk(logits, torch.tensor([0, 100, 1, 2]), vocab_size=100)


def test_forbidden_ids_enter_only_as_gold() -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[:, [5, 7]] = torch.tensor([1.0, 1.0])
    for tau in (0.9, 1.0):
        sets = dynamic_topk(logits, torch.tensor([7, 9]), tau, min_set_size=3)
        assert [sets.ids[a:b].tolist() for a, b in ((0, 2), (2, 5))] == [[5, 7], [5, 7, 9]]
        assert sets.outside_mass.tolist() == [0.0, 0.0]


def test_a_minimum_size_keeps_the_next_probable() -> None:
    logits = torch.tensor([[0.0, 50.0, 1.0, 2.0]])
    assert dynamic_topk(logits, torch.tensor([1])).ids.tolist() == [1]
    assert dynamic_topk(logits, torch.tensor([1]), min_set_size=2).ids.tolist() == [1, 3]


def test_no_rows_make_no_sets() -> None:
    sets = dynamic_topk(torch.empty(0, 30), torch.empty(0, dtype=torch.long), keep_logits=True).check(30)
    assert sets.num_positions == 0
    assert sets.offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("value", "says"), [(torch.nan, "row 2 .* NaN"), (torch.inf, "row 2 .* NaN"), (-torch.inf, "row 2 .* no finite")]
)
def test_a_broken_row_is_named(value: float, says: str) -> None:
    logits = draw("float", 4, 500, 0)
    logits[2, slice(None) if value == -torch.inf else 499] = value
    with pytest.raises(DataError, match=says):
        dynamic_topk(logits, torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    "options", [{"tau": 0.0}, {"tau": 1.1}, {"k_max": 0}, {"min_set_size": 0}, {"k_max": 3, "min_set_size": 4}]
)
def test_a_rule_that_cannot_be_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        dynamic_topk(torch.zeros(1, 9), torch.zeros(1, dtype=torch.long), **options)  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="one gold id a row"):
        dynamic_topk(torch.zeros(2, 9), torch.zeros(3, dtype=torch.long))
    with pytest.raises(LayoutError, match=r"0\.\.8"):
        dynamic_topk(torch.zeros(2, 9), torch.zeros(2, dtype=torch.long), shard=VocabShard(0, 8))
    with pytest.raises(LayoutError):
        VocabShard(5, 4)


def test_an_id_for_every_set_must_be_one_of_the_vocabulary() -> None:
    logits, gold = draw("float", 3, 50, 0), torch.tensor([1, 2, 3])
    assert (dynamic_topk(logits, gold, k_max=2, always=[49]).ids == 49).sum() == 3
    with pytest.raises(ConfigError, match="id 50 is to be in every set, and is held by 0 ranks"):
        dynamic_topk(logits, gold, always=[50])
    with pytest.raises(ConfigError, match="id 45 is to be in every set"):
        dynamic_topk(logits, gold, always=[45], vocab_size=40)
