from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import CheckpointError, LayoutError
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import (
    half_split_rows,
    merge,
    restripe,
    shard,
    split,
    unshard,
)


def make_spec(
    heads_per_group=2, groups=3, dim=4, ffn=8, vocab=37, tied=False, qk_norm=True, layers=1, hidden=6
) -> ModelSpec:
    return ModelSpec.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads_per_group * groups,
            "num_key_value_heads": groups,
            "head_dim": dim,
            "intermediate_size": ffn,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 16,
            "tie_word_embeddings": tied,
        }
    )


def random_tensors(spec: ModelSpec, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in WeightTable(spec).hf_shapes.items()
    }


specs = st.builds(
    make_spec,
    heads_per_group=st.integers(1, 4),
    groups=st.integers(1, 5),
    dim=st.sampled_from([2, 4, 6]),
    ffn=st.sampled_from([4, 8, 12]),
    vocab=st.integers(1, 260),
    tied=st.booleans(),
    qk_norm=st.booleans(),
    hidden=st.integers(1, 9),
)


@settings(deadline=None, max_examples=40)
@given(specs, st.sampled_from([1, 2, 4]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_merge_shard_unshard_split_is_bit_exact(spec, tensor_ranks, dtype, striped):
    tensors = random_tensors(spec, dtype)
    back = {}
    for weight in WeightTable(spec, head_multiple=tensor_ranks, striped=striped):
        whole = merge(weight, tensors)
        assert tuple(whole.shape) == weight.shape
        assert whole.dtype == dtype
        parts = [shard(whole, weight.axis, rank, tensor_ranks) for rank in range(tensor_ranks)]
        assert len({part.shape for part in parts}) == 1
        assert all(part.is_contiguous() for part in parts)
        back.update(split(weight, unshard(parts, weight.axis)))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_qkv_rows_are_grouped_by_key_value_head():
    """Row r of q, k, v holds 100r, 100r+1, 100r+2: the order of the fused rows can be read off."""
    spec = make_spec(heads_per_group=2, groups=2, dim=2, hidden=1)
    weight = WeightTable(spec, head_multiple=3)["decoder.layers.0.self_attention.linear_qkv.weight"]
    q, k, v = (torch.arange(n)[:, None] * 100 + i for i, n in enumerate((8, 4, 4)))
    fused = merge(weight, dict(zip(weight.hf, (q, k, v), strict=True))).flatten().tolist()
    assert fused == [0, 100, 200, 300, 1, 101, 2, 102, 400, 500, 600, 700, 201, 301, 202, 302] + [0] * 8


@pytest.mark.parametrize("vocab", [1, 7, 37, 128, 130])
def test_a_striped_vocabulary_is_dealt_out_in_eights(vocab):
    """Row of id v in a vocabulary of V rows: (v mod 8) (V / 8) + v div 8. The rows of no id are zero."""
    spec = make_spec(hidden=1, vocab=vocab)
    plain, striped = (WeightTable(spec, striped=striped)["output_layer.weight"] for striped in (False, True))
    tensors = {"lm_head.weight": torch.arange(1.0, vocab + 1)[:, None]}
    whole, dealt = merge(plain, tensors), merge(striped, tensors)
    rows = len(whole)
    assert [float(dealt[v % 8 * (rows // 8) + v // 8]) for v in range(vocab)] == list(range(1, vocab + 1))
    assert int((dealt != 0).sum()) == vocab
    assert torch.equal(restripe(whole, striped=True), dealt) and torch.equal(restripe(dealt, striped=False), whole)
    assert torch.equal(split(striped, dealt)["lm_head.weight"], tensors["lm_head.weight"])


def test_padding_is_zero():
    spec = make_spec(groups=3)
    tensors = {name: tensor.abs() + 1 for name, tensor in random_tensors(spec).items()}
    whole = {weight.name: merge(weight, tensors) for weight in WeightTable(spec, head_multiple=4)}
    assert whole["embedding.word_embeddings.weight"].shape == (128, 6)
    assert not whole["embedding.word_embeddings.weight"][37:].any()
    assert not whole["output_layer.weight"][37:].any()
    assert not whole["decoder.layers.0.self_attention.linear_qkv.weight"][3 * 4 * 4 :].any()
    assert whole["decoder.layers.0.self_attention.linear_proj.weight"].shape == (6, 4 * 2 * 4)
    assert not whole["decoder.layers.0.self_attention.linear_proj.weight"][:, 3 * 2 * 4 :].any()


def test_gate_up_shards_hold_a_part_of_each_half():
    fc1 = torch.arange(8)[:, None]
    assert shard(fc1, "gate_up", 1, 2).flatten().tolist() == [2, 3, 6, 7]
    assert torch.equal(unshard([shard(fc1, "gate_up", rank, 2) for rank in (0, 1)], "gate_up"), fc1)


def test_wrong_shapes_are_named():
    spec = make_spec()
    tensors = random_tensors(spec)
    weight = WeightTable(spec)["decoder.layers.0.self_attention.linear_qkv.weight"]
    with pytest.raises(
        CheckpointError, match=r"'model\.layers\.0\.self_attn\.k_proj\.weight' is \[6, 12\], expected \[12, 6\]"
    ):
        merge(weight, {**tensors, weight.hf[1]: tensors[weight.hf[1]].T})
    with pytest.raises(CheckpointError, match=r"linear_qkv\.weight' is \[1, 6\], expected"):
        split(weight, torch.zeros(1, 6))
    with pytest.raises(LayoutError, match="3 equal parts"):
        shard(torch.zeros(4, 2), 0, 0, 3)


def test_half_split_rows_turns_neighbours_into_halves():
    rows = torch.arange(12)[:, None]  # two heads of six rows: pairs (0 1) (2 3) (4 5)
    assert half_split_rows(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
