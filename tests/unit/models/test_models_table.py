"""The table of a model's parameters: names, order, and what padding, stripes and an adapter change."""

from __future__ import annotations

import math

import pytest

from megatron_replay.config import Adapter, Layout
from megatron_replay.errors import CheckpointError
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable


def make_spec(groups: int = 3, tied: bool = False, qk_norm: bool = True, layers: int = 1) -> ModelSpec:
    """Two query heads a group, of size 4."""
    return ModelSpec.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM"],
            "num_hidden_layers": layers,
            "hidden_size": 6,
            "num_attention_heads": 2 * groups,
            "num_key_value_heads": groups,
            "head_dim": 4,
            "intermediate_size": 8,
            "vocab_size": 37,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 16,
            "tie_word_embeddings": tied,
        }
    )


def test_megatron_names():
    names = [weight.name for weight in WeightTable(make_spec(layers=2))]
    layer = [
        "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]
    layers = [f"decoder.layers.{i}.{name}" for i in (0, 1) for name in layer]
    assert names == [
        "embedding.word_embeddings.weight",
        *layers,
        "decoder.final_layernorm.weight",
        "output_layer.weight",
    ]
    assert [weight.layer for weight in WeightTable(make_spec())] == [None] + [0] * 8 + [None, None]
    assert not any("q_layernorm" in weight.name for weight in WeightTable(make_spec(qk_norm=False)))


def test_only_vocabulary_weights_are_striped():
    spec = make_spec()
    assert [w.name for w in WeightTable(spec, striped=True) if w.striped] == [
        w.name for w in WeightTable(spec) if w.kind == "vocab"
    ]
    tied = WeightTable(make_spec(tied=True), striped=True)
    assert tied["output_layer.weight"] == tied["embedding.word_embeddings.weight"]
    assert not any(w.striped for w in WeightTable(spec))


def test_tied_output_layer_is_the_embedding():
    tied, untied = WeightTable(make_spec(tied=True)), WeightTable(make_spec(tied=False))
    assert tied["output_layer.weight"] == tied["embedding.word_embeddings.weight"]
    assert untied["output_layer.weight"].hf == ("lm_head.weight",)
    assert "output_layer.weight" not in [weight.name for weight in tied]


def test_unknown_parameter_gets_the_nearest_name():
    with pytest.raises(
        CheckpointError,
        match=r"no parameter 'decoder\.final_norm\.weight'; did you mean 'decoder\.final_layernorm\.weight'",
    ):
        WeightTable(make_spec())["decoder.final_norm.weight"]


def test_a_layout_and_an_adapter_decide_the_table():
    spec = make_spec()
    table = WeightTable.of(spec, Layout(tensor=2, head_multiple=4))
    assert table == WeightTable(spec, head_multiple=4, striped=True)
    assert table.heads == (8, 4) and table.has_padded_heads and not WeightTable(spec, head_multiple=3).has_padded_heads
    assert table.numel == sum(math.prod(weight.shape) for weight in table)
    adapted = table.with_adapter(Adapter(rank=2))
    assert [*adapted] == [*table, *adapted.factors] and len(adapted) == len(table) + 2 * 4
    assert adapted.numel == table.numel and adapted.hf_shapes == table.hf_shapes == WeightTable(spec).hf_shapes
    assert all(adapted[weight.name] == weight for weight in adapted)


def test_a_weight_knows_its_shape_without_padding():
    plain, padded = WeightTable(make_spec()), WeightTable(make_spec(), head_multiple=4)
    inside = [weight.name for weight in plain if weight.layer is not None]
    assert all(plain[name].shape == plain[name].plain == padded[name].plain for name in inside)
    differing = [name.split(".")[-2] for name in inside if padded[name].shape != plain[name].shape]
    assert differing == ["linear_qkv", "linear_proj"]
