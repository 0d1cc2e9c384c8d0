"""Fixtures for tests of models and their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _config(**changes: Any) -> dict[str, Any]:
    """A tiny Qwen3 config.json, every key of which a real one has."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 4,
        "hidden_act": "silu",
        "hidden_size": 24,
        "intermediate_size": 20,
        "max_position_embeddings": 64,
        "max_window_layers": 2,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 37,
    }
    config.update(changes)
    return {key: value for key, value in config.items() if value != "DROP"}


@pytest.fixture
def config() -> Callable[..., dict[str, Any]]:
    """config(key=value): the tiny config with changes; the value "DROP" leaves a key out."""
    return _config


@pytest.fixture
def saved_model(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """saved_model(family, tied): a random tiny model of transformers and the folder that save_pretrained wrote."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")  # some unit tests do without it

    def make(family: str, tied: bool, **options: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        keys = (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "vocab_size",
            "head_dim",
        )
        chosen = {key: _config()[key] for key in keys}
        config = getattr(transformers, f"{family}Config")(**chosen, tie_word_embeddings=tied)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn_like(weight) * 0.2)
        folder = tmp_path / f"{family}-{tied}"
        model.save_pretrained(folder, **options)
        return model, folder

    return make
