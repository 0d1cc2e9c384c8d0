"""Importer of GGUF files (llama.cpp's format, quantised or not) of the llama architecture.

The result is a Hugging Face folder in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from megatron_replay.errors import CheckpointError, ReplayError
from megatron_replay.formats.bpe import SPACE, begin_with, byte_level_bpe, scored_bpe
from megatron_replay.formats.hf_writer import HFWriter
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import half_split_rows

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Hugging Face tensor -> GGUF tensor, layer prefix and ".weight" aside."""
CONTROL, USER_DEFINED = 3, 4
"""GGUF token types: special tokens, and added tokens that stay visible when decoding."""


def import_gguf(gguf_path: str | Path, folder: str | Path) -> Path:
    """Write weights (dequantised one at a time), config, tokenizer and generation config; returns the folder.

    Raises ReplayError without the gguf package, CheckpointError for a damaged file, another architecture or an unknown
    tokenizer.
    """
    path = Path(gguf_path)
    reader = _open(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(meta, tensors)
        tokenizer = _tokenizer(meta)
        tokenizer_config = _tokenizer_config(meta)
    except KeyError as err:
        raise CheckpointError(f"{path}: key {err} is missing from the file's metadata") from err
    except CheckpointError as err:
        raise CheckpointError(f"{path}: {err}") from err
    spec = ModelSpec.from_hf(config)
    with HFWriter(folder, spec, dtype=torch.float32) as out:
        for name, shape in WeightTable(spec).hf_shapes.items():
            source = tensors.get(_gguf_name(name))
            if source is None:
                raise CheckpointError(f"{path}: tensor {_gguf_name(name)!r} is missing")
            out.add(name, _half_split(name, _dequantize(source).reshape(shape), spec))
        out.write_side_file("config.json", config)
        out.write_side_file("tokenizer.json", tokenizer.to_str(pretty=True))
        out.write_side_file("tokenizer_config.json", tokenizer_config)
        out.write_side_file("generation_config.json", _token_ids(meta))
    return Path(folder)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as err:
        raise ReplayError("reading GGUF needs the gguf package: pip install megatron-replay[demo]") from err
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as err:
        raise CheckpointError(f"{path}: not a GGUF file, or truncated ({err}); download it again") from err


def _dequantize(tensor: Any) -> Tensor:
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def _gguf_name(name: str) -> str:
    """GGUF name of a Hugging Face tensor: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def _half_split(name: str, tensor: Tensor, spec: ModelSpec) -> Tensor:
    """llama.cpp stores query and key rows for interleaved rotary pairs."""
    if name.endswith("q_proj.weight"):
        return half_split_rows(tensor, spec.num_heads)
    return half_split_rows(tensor, spec.num_kv_heads) if name.endswith("k_proj.weight") else tensor


def _config(meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    architecture = meta["general.architecture"]
    if architecture != "llama":
        raise CheckpointError(f"GGUF architecture {architecture!r} is not supported; known: llama")
    heads, hidden = meta["llama.attention.head_count"], meta["llama.embedding_length"]
    head_dim = meta.get("llama.attention.key_length", hidden // heads)
    _refuse_unsupported(meta, tensors, head_dim)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "max_position_embeddings": meta["llama.context_length"],
        # stored as float32: 1e-5 comes back as 9.999999747378752e-06
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": meta.get("llama.rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **_token_ids(meta),
    }


def _refuse_unsupported(meta: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int) -> None:
    if meta.get("llama.expert_count"):
        raise CheckpointError(f"llama.expert_count={meta['llama.expert_count']}: mixtures of experts are not supported")
    if meta.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            f"llama.rope.dimension_count={meta['llama.rope.dimension_count']}: only rotary over the whole head "
            f"({head_dim}) works"
        )
    scaling = meta.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise CheckpointError(
            "stretched rotary frequencies (llama.rope.scaling or rope_freqs.weight) are not supported in GGUF files"
        )
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases:
        raise CheckpointError(f"tensor {biases[0]!r}: models with biases are not supported")


def _token_ids(meta: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {
        ours: meta[f"tokenizer.ggml.{theirs}_token_id"]
        for ours, theirs in names.items()
        if f"tokenizer.ggml.{theirs}_token_id" in meta
    }


def _tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    kind, tokens = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.tokens"]
    if kind == "llama":
        tokenizer = scored_bpe([token.replace(" ", SPACE) for token in tokens], meta["tokenizer.ggml.scores"])
    elif kind == "gpt2":
        tokenizer = byte_level_bpe(tokens, meta["tokenizer.ggml.merges"], meta.get("tokenizer.ggml.pre", "gpt-2"))
        if meta.get("tokenizer.ggml.add_bos_token"):
            bos = meta["tokenizer.ggml.bos_token_id"]
            tokenizer.post_processor = begin_with(tokens[bos], bos)
    else:
        raise CheckpointError(f"tokenizer {kind!r} is not supported; known: gpt2 (byte-level), llama (sentencepiece)")
    types = list(zip(tokens, meta["tokenizer.ggml.token_type"], strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, type_ in types if type_ == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, type_ in types if type_ == USER_DEFINED])
    return tokenizer


def _tokenizer_config(meta: Mapping[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {ours: meta.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    template = meta.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        **{ours: tokens[i] for ours, i in ids.items() if i is not None},
        **({"chat_template": template} if template else {}),
    }
