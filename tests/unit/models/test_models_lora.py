"""The factors of LoRA adapters as data: shapes, cuts, starting values, the merge."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_replay.config import Adapter
from megatron_replay.errors import ConfigError
from megatron_replay.models.lora import A, B, beside, check, initial, merged, scale
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import merge, shard, split, unshard

FOUR = Adapter(rank=4, alpha=8.0)


def make_spec(groups: int = 3, layers: int = 1, hidden: int = 16) -> ModelSpec:
    """Two query heads a group, of size 4."""
    return ModelSpec.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": 2 * groups,
            "num_key_value_heads": groups,
            "head_dim": 4,
            "intermediate_size": 8,
            "vocab_size": 37,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 16,
            "tie_word_embeddings": False,
        }
    )


def test_every_target_of_every_layer_has_its_two_factors() -> None:
    table = WeightTable(make_spec(layers=2, hidden=16), adapter=FOUR)
    found = {factor.name: factor for factor in table.factors}
    assert len(found) == 2 * 2 * 4
    for weight in table.base:
        a, b = beside(weight)
        if weight.layer is not None and len(weight.shape) == 2:
            assert table.factors_of(weight) == (found[a], found[b])
            assert found[a].shape == (4, weight.shape[1]) and found[b].shape == (weight.shape[0], 4)
            assert found[a].layer == found[b].layer == weight.layer
            assert (found[a].axis, found[b].axis) == ((1, None) if weight.axis == 1 else (None, weight.axis))
        else:
            assert a not in found and b not in found
            assert table.factors_of(weight) is None
    only = table.with_adapter(Adapter(rank=4, targets=("linear_fc2",)))
    assert [factor.name for factor in only.factors] == [
        f"decoder.layers.{i}.mlp.linear_fc2.{word}" for i in range(2) for word in (A, B)
    ]


@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_factors_are_cut_and_joined_exactly_and_padding_is_zero(multiple: int, ranks: int) -> None:
    spec = make_spec(groups=4 if multiple < ranks else 3, hidden=16)
    for factor in WeightTable(spec, head_multiple=multiple, adapter=FOUR).factors:
        (plain,) = factor.hf_shapes
        start = 1 + torch.rand(plain)
        whole = merge(factor, {factor.name: start})
        assert tuple(whole.shape) == factor.shape and (whole != 0).sum() == start.numel()
        if (
            factor.axis is None
            or factor.shape[1 if factor.axis == 1 else 0] % (ranks * (2 if factor.axis == "gate_up" else 1)) == 0
        ):
            parts = [shard(whole, factor.axis, rank, ranks) for rank in range(ranks)]
            assert torch.equal(unshard(parts, factor.axis), whole)
        assert torch.equal(split(factor, whole)[factor.name], start)


def test_the_start_depends_on_name_and_seed_alone() -> None:
    spec = make_spec(layers=2, hidden=16)
    table, padded = (WeightTable(spec, head_multiple=multiple, adapter=FOUR).factors for multiple in (1, 4))
    starts = [initial(factor, 7) for factor in table]
    assert all(torch.equal(a, initial(factor, 7)) for a, factor in zip(starts, padded, strict=True)), (
        "padding changes nothing"
    )
    firsts = [start for start, factor in zip(starts, table, strict=True) if factor.name.endswith(A)]
    assert all(not start.any() for start, factor in zip(starts, table, strict=True) if factor.name.endswith(B))
    assert len({float(start[0, 0]) for start in firsts}) == len(firsts)
    assert not torch.equal(firsts[0], initial(table[0], 8))


def test_a_starts_as_kaiming_uniform() -> None:
    spec = make_spec(hidden=400)
    (start,) = (
        initial(factor, 1)
        for factor in WeightTable(spec, adapter=Adapter(rank=64, targets=("linear_fc1",))).factors
        if factor.name.endswith(A)
    )
    bound = math.sqrt(6 / ((1 + 5) * 400))  # torch.nn.init.kaiming_uniform_(a=sqrt 5)
    assert start.abs().max() <= bound and start.abs().max() > 0.99 * bound
    assert (
        float(start.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02) and abs(float(start.mean())) < 0.01 * bound
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merged_is_the_sum_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((6, 10), (4, 10), (6, 4))
    )
    before = weight.clone()
    found = merged(weight, a, b, FOUR)
    exact = weight.double() + scale(FOUR) * b.double() @ a.double()
    assert found.dtype == dtype and torch.equal(weight, before)
    assert torch.allclose(
        found.double(), exact, rtol={torch.float64: 1e-14, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype], atol=1e-5
    )
    rows = torch.cat([merged(weight[i : i + 3], a, b[i : i + 3], FOUR) for i in (0, 3)])
    columns = torch.cat([merged(weight[:, i : i + 5], a[:, i : i + 5], b, FOUR) for i in (0, 5)], 1)
    assert torch.allclose(rows, found) and torch.allclose(columns, found)


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    table = WeightTable(make_spec(hidden=6), head_multiple=4)
    check(Adapter(rank=6), table)
    with pytest.raises(ConfigError, match=r"adapter\.rank=7 is too large: linear_qkv is \[48, 6\]; give at most 6"):
        check(Adapter(rank=7), table)
