"""Importer of llama2.c checkpoints and their tokenizers; the result is a Hugging Face folder.

The legacy format (version 0) is read: seven int32, then float32 weights.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError
from megatron_replay.formats.bpe import SPACE, scored_bpe
from megatron_replay.formats.hf_writer import HFWriter
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import half_split_rows

HEADER = struct.Struct("<7i")
VERSIONED_MAGIC = 0x616B3432
"""First word of llama2.c's later formats."""
SPECIAL = ("<unk>", "<s>", "</s>")
ORDER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)
"""Between the embedding and the final norm: each of these for all layers."""


def import_llama2c(bin_path: str | Path, tokenizer_bin: str | Path, folder: str | Path) -> Path:
    """Write weights, config, tokenizer and generation config; returns the folder.

    Raises CheckpointError for a file that is not such a checkpoint, or a tokenizer of another size.
    """
    path = Path(bin_path)
    config = _config(path)
    spec = ModelSpec.from_hf(config)
    offsets = _offsets(path, spec, config["max_position_embeddings"])
    tokens, scores = read_tokenizer(tokenizer_bin)
    if len(tokens) != spec.vocab_size:
        raise CheckpointError(
            f"{tokenizer_bin}: {len(tokens)} tokens, but {path.name} has {spec.vocab_size}; pass the model's own "
            "tokenizer"
        )
    with HFWriter(folder, spec, dtype=torch.float32) as out:
        data = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size)
        for name, shape in WeightTable(spec).hf_shapes.items():
            tensor = torch.from_numpy(data[offsets[name] : offsets[name] + math.prod(shape)].copy()).view(shape)
            out.add(name, _half_split(name, tensor, spec))
        out.write_side_file("config.json", config)
        out.write_side_file("tokenizer.json", scored_bpe(tokens, scores).to_str(pretty=True))
        out.write_side_file("tokenizer_config.json", _tokenizer_config(spec))
        out.write_side_file("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return Path(folder)


def read_tokenizer(path: str | Path) -> tuple[list[str], list[float]]:
    """(tokens in id order, spaces made visible; their scores) of a llama2.c tokenizer.

    The file: int32 longest length, then for each token float32 score, int32 length, bytes. CheckpointError when it is
    something else.
    """
    tokens: list[str] = []
    scores: list[float] = []
    try:
        data = Path(path).read_bytes()
        at = 4
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                raise ValueError(f"token {len(tokens)} has length {length}")
            tokens.append(data[at - length : at].decode().replace(" ", SPACE))
            scores.append(score)
    except FileNotFoundError as err:
        raise CheckpointError(
            f"{path}: no such file; a llama2.c checkpoint needs its tokenizer, e.g. tok512.bin"
        ) from err
    except (struct.error, ValueError) as err:
        raise CheckpointError(f"{path}: not a llama2.c tokenizer, or truncated ({err})") from err
    # llama2.c's export writes the special tokens with line breaks around them
    return [*SPECIAL, *tokens[3:]], scores


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise CheckpointError(f"{path}: {len(head)} bytes is too short for a llama2.c checkpoint")
    dim, ffn, layers, heads, kv_heads, vocab, positions = HEADER.unpack(head)
    if dim == VERSIONED_MAGIC:
        raise CheckpointError(
            f"{path}: a llama2.c checkpoint of version {ffn}; only version 0 is read (export it with --version 0)"
        )
    if min(dim, ffn, layers, heads, kv_heads, positions, abs(vocab)) < 1 or dim % heads or heads % kv_heads:
        raise CheckpointError(
            f"{path}: not a llama2.c checkpoint (its first numbers are {dim}, {ffn}, {layers}, {heads}, {kv_heads}, "
            f"{vocab}, {positions})"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim // heads,
        "vocab_size": abs(vocab),
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": vocab > 0,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _offsets(path: Path, spec: ModelSpec, positions: int) -> dict[str, int]:
    """Offset of every Hugging Face tensor, in float32 numbers after the header.

    CheckpointError when the file's length differs.
    """
    shapes = WeightTable(spec).hf_shapes
    order = ["model.embed_tokens.weight"]
    order += [f"model.layers.{layer}.{part}.weight" for part in ORDER for layer in range(spec.num_layers)]
    order.append("model.norm.weight")
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        offsets[name], end = end, end + math.prod(shapes[name])
    end += positions * spec.head_dim  # two tables of rotary cosines and sines, half a head wide: computed, not read
    if not spec.tied:
        offsets["lm_head.weight"], end = end, end + math.prod(shapes["lm_head.weight"])
    if path.stat().st_size != HEADER.size + 4 * end:
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, its header promises {HEADER.size + 4 * end}; truncated or not a "
            "llama2.c checkpoint"
        )
    return offsets


def _half_split(name: str, tensor: Tensor, spec: ModelSpec) -> Tensor:
    """llama2.c rotates neighbouring query and key rows."""
    if name.endswith("q_proj.weight"):
        return half_split_rows(tensor, spec.num_heads)
    return half_split_rows(tensor, spec.num_kv_heads) if name.endswith("k_proj.weight") else tensor


def _tokenizer_config(spec: ModelSpec) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_positions,
        **dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    }
