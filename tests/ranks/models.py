"""Tiny models and inputs for tests, the same numbers on every machine: they come from PCG64's raw stream, whose bits
numpy guarantees."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable

QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 250,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 48,
    "vocab_size": 300,  # 384 rows: three ranks divide them, and four
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def raw(count: int, *words: int | str) -> np.ndarray:
    """[count] uint64 that depend on the words alone."""
    seed = [part for word in words for part in ([word] if isinstance(word, int) else word.encode())]
    return np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)


def draw(count: int, below: int, *words: int | str) -> np.ndarray:
    """[count] int64 in 0..below-1."""
    return (raw(count, *words) % np.uint64(below)).astype(np.int64)


def value(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight that depends on its name, exact in fp32.

    Vectors (norms) are in 0.5..1.5, matrices uniform with standard deviation 0.1.
    """
    unit = torch.from_numpy((raw(math.prod(shape), name) >> np.uint64(40)).astype(np.float64) / 2**24).view(shape)
    return (0.5 + unit if len(shape) == 1 else (unit - 0.5) * 0.34375).float()


def write_folder(folder: Path, config: dict[str, Any]) -> Path:
    """A Hugging Face folder, made without transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"dtype": "float32", **config}))
    tensors = {name: value(name, shape) for name, shape in WeightTable(ModelSpec.from_hf(config)).hf_shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tied_and_untied(root: Path, config: dict[str, Any]) -> dict[bool, str]:
    """True where the output layer is the embedding -> a folder of such a model."""
    return {
        tied: str(write_folder(root / str(tied), {**config, "tie_word_embeddings": tied})) for tied in (True, False)
    }


def with_transformers(folder: Path, config: dict[str, Any]) -> Any:
    """transformers' own model of a configuration, filled by name and saved.

    The test is skipped where transformers is missing.
    """
    transformers = pytest.importorskip("transformers")
    name = config["architectures"][0]
    settings = getattr(transformers, name.replace("ForCausalLM", "Config"))(
        **{k: v for k, v in config.items() if k != "architectures"}
    )
    model = getattr(transformers, name)(settings).float().eval()
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            tensor.copy_(value(parameter, tuple(tensor.shape)))
    model.save_pretrained(folder)
    return model


def tokens(lengths: tuple[int, ...], vocab: int, *words: int | str) -> list[np.ndarray]:
    """A token id sequence of each length."""
    return [draw(length, vocab, "tokens", i, *words) for i, length in enumerate(lengths)]
