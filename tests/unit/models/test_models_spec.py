from __future__ import annotations

import json

import pytest

from megatron_replay.config import Layout
from megatron_replay.errors import CheckpointError, LayoutError
from megatron_replay.models.layout import stage_layers, validate_layout
from megatron_replay.models.rope import RopeScaling
from megatron_replay.models.spec import ModelSpec


def test_reads_every_field(config):
    spec = ModelSpec.from_hf(config())
    assert (spec.architecture, spec.num_layers, spec.hidden_size, spec.ffn_size) == ("Qwen3ForCausalLM", 2, 24, 20)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.heads_per_group) == (6, 3, 4, 2)
    assert (spec.vocab_size, spec.max_positions, spec.norm_eps, spec.dtype) == (37, 64, 1e-6, "bfloat16")
    assert (spec.tied, spec.qk_norm, spec.rope_base, spec.rope_scaling) == (False, True, 1e6, None)


def test_defaults_of_each_family(config):
    llama = ModelSpec.from_hf(
        config(
            architectures=["LlamaForCausalLM"],
            head_dim="DROP",
            num_key_value_heads="DROP",
            rope_theta="DROP",
            torch_dtype="DROP",
        )
    )
    assert (llama.head_dim, llama.num_kv_heads, llama.rope_base, llama.qk_norm, llama.dtype) == (
        4,
        6,
        1e4,
        False,
        "float32",
    )
    assert ModelSpec.from_hf(config(head_dim="DROP")).head_dim == 128


def test_folder_and_mapping_agree(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config()))
    assert ModelSpec.from_hf(tmp_path) == ModelSpec.from_hf(str(tmp_path)) == ModelSpec.from_hf(config())


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("keys", "base", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": "DROP", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e6, RopeScaling(kind="linear", factor=2.0)),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 3}},
            1e4,
            RopeScaling(kind="linear", factor=3.0),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            1e6,
            RopeScaling(
                kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=4096
            ),
        ),
    ],
)
def test_rope_in_both_spellings(config, keys, base, scaling):
    spec = ModelSpec.from_hf(config(**keys))
    assert (spec.rope_base, spec.rope_scaling) == (base, scaling)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"architectures": ["Qwen3ForCasualLM"]}, "did you mean 'Qwen3ForCausalLM'"),
        ({"architectures": ["BertModel"]}, "known: LlamaForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": "DROP"}, "'architectures' is missing"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8}, "mixture of experts (num_experts=8)"),
        ({"num_local_experts": 4}, "mixture of experts"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window=true"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'factor' is missing"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one flat table"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_size": "DROP"}, "'hidden_size' is missing"),
        ({"rms_norm_eps": "DROP"}, "'rms_norm_eps' is missing"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number above 0, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number above 0, got 0"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
    ],
)
def test_refuses_by_name_in_one_line(config, keys, said):
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_hf(config(**keys))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sliding_window_beyond_the_last_layer_is_not_in_use(config):
    assert ModelSpec.from_hf(config(use_sliding_window=True, max_window_layers=2)).num_layers == 2


def test_unreadable_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        ModelSpec.from_hf(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json in it"):
        ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        ModelSpec.from_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"is a file; .*convert"):
        ModelSpec.from_hf(tmp_path / "config.json")


def test_padding(config):
    spec = ModelSpec.from_hf(config(vocab_size=129))
    assert (spec.padded_vocab(), spec.padded_vocab(100), spec.padded_vocab(43)) == (256, 200, 129)
    assert [spec.padded_heads(multiple) for multiple in (1, 2, 3, 4)] == [(6, 3), (8, 4), (6, 3), (8, 4)]


def test_layouts_that_fit(config):
    spec = ModelSpec.from_hf(config(num_hidden_layers=7))
    assert validate_layout(spec, Layout()) == [7]
    assert validate_layout(spec, Layout(tensor=2, pipeline=3, head_multiple=2)) == [3, 2, 2]
    assert validate_layout(spec, Layout(tensor=4, pipeline=2, split=(2, 5), head_multiple=4)) == [2, 5]
    assert stage_layers(4, 4) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            {"tensor": 2},
            "3 key/value heads are not divisible by layout.tensor=2; set layout.head_multiple=2 (or 4 for up to 4 "
            "ranks) "
            "to pad with zero heads, or use layout.tensor=1 or 3",
        ),
        (
            {"tensor": 8, "head_multiple": 4},
            "4 key/value heads (3 padded by layout.head_multiple=4) are not divisible by layout.tensor=8",
        ),
        (
            {"tensor": 8, "head_multiple": 8},
            "ffn_size=20 is not divisible by layout.tensor=8; use layout.tensor=1, 2, 4, 5, 10 or 20",
        ),
        ({"pipeline": 3}, "2 layers cannot fill layout.pipeline=3 stages; use layout.pipeline=1 to 2"),
        ({"pipeline": 2, "split": (2,)}, "has 1 stages, but layout.pipeline=2"),
        ({"pipeline": 2, "split": (2, 1)}, "add up to 2 layers, it adds up to 3"),
        ({"pipeline": 2, "split": (2, 0)}, "must give every stage a layer"),
    ],
)
def test_layouts_that_do_not_fit(config, layout, said):
    with pytest.raises(LayoutError) as caught:
        validate_layout(ModelSpec.from_hf(config()), Layout(**layout))
    assert said in str(caught.value)


def test_vocabulary_rows_that_do_not_divide(config):
    with pytest.raises(
        LayoutError,
        match=r"128 vocabulary rows \(37 rounded up to a multiple of 128\) are not divisible by layout.tensor=3",
    ):
        validate_layout(ModelSpec.from_hf(config(intermediate_size=21)), Layout(tensor=3))
