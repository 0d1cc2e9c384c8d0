"""The shape of a model as its Hugging Face config.json gives it, checked.

A new family is one line in `ARCHITECTURES`, as long as its layer is norm, attention, norm, gated silu MLP.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import CheckpointError
from megatron_replay.models.rope import RopeScaling, read_rope

VOCAB_MULTIPLE = 128
"""Padded vocabulary rows are a multiple of this.

It is the same for every tensor-parallel size, so that checkpoints move between layouts.
"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The differences of a family from the plain Llama layer."""

    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    head_dim: int | None = None
    """Head size when config.json gives none; None: hidden_size / num_attention_heads."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(qk_norm=True, head_dim=128),
}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a dense decoder-only model; built by `from_hf`."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    """Rows of the Hugging Face embedding; may exceed the number of ids the tokenizer knows."""
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied: bool
    """The output layer is the embedding matrix."""
    qk_norm: bool
    max_positions: int
    dtype: str
    """torch name of the stored weights' type, e.g. bfloat16."""

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> ModelSpec:
        """Read a folder's config.json, or the mapping itself.

        Raises CheckpointError, in one line: no config.json, broken JSON, a missing or senseless key, or a feature that
        is not supported.
        """
        if isinstance(source, Mapping):
            return _spec(source, "config.json")
        return _spec(read_config(source), str(Path(source) / "config.json"))

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def padded_vocab(self, multiple: int = VOCAB_MULTIPLE) -> int:
        """Vocabulary rows rounded up to the multiple."""
        return -(-self.vocab_size // multiple) * multiple

    def padded_heads(self, head_multiple: int = 1) -> tuple[int, int]:
        """(query heads, key/value heads) once the key/value heads are rounded up to the multiple.

        Each group keeps its query heads.
        """
        groups = -(-self.num_kv_heads // head_multiple) * head_multiple
        return groups * self.heads_per_group, groups


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder as a dict; CheckpointError when it is missing or not a JSON object."""
    folder = Path(folder)
    path = folder / "config.json"
    if folder.is_file():
        raise CheckpointError(
            f"{folder} is a file; make a Hugging Face folder of a .gguf or llama2.c .bin file first: convert {folder} "
            "FOLDER"
        )
    if not path.is_file():
        found = "no such folder" if not folder.exists() else "no config.json in it"
        raise CheckpointError(
            f"{folder}: {found}; a model is a Hugging Face folder with config.json and safetensors files"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{path}: not valid JSON ({err}); download it again") from err
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    name = _architecture(config, where)
    family = ARCHITECTURES[name]
    _refuse_unsupported(config, where)
    heads = _count(config, "num_attention_heads", where)
    kv_heads = _count(config, "num_key_value_heads", where, heads)
    hidden = _count(config, "hidden_size", where)
    if heads % kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
        )
    base, scaling = read_rope(config, where)
    return ModelSpec(
        architecture=name,
        num_layers=_count(config, "num_hidden_layers", where),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_count(config, "head_dim", where, family.head_dim or hidden // heads),
        ffn_size=_count(config, "intermediate_size", where),
        vocab_size=_count(config, "vocab_size", where),
        norm_eps=_positive(config, "rms_norm_eps", where),
        rope_base=base,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        max_positions=_count(config, "max_position_embeddings", where),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def _architecture(config: Mapping[str, Any], where: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise CheckpointError(
            f"{where}: key 'architectures' is missing; it names the model class, e.g. "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    name = str(names[0])
    experts = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), None)
    if experts or "moe" in name.lower():
        raise CheckpointError(
            f"{where}: {name} is a mixture of experts{f' ({experts}={config[experts]})' if experts else ''}; only "
            "dense models work"
        )
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.9)  # a typo, and not another family's class
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(ARCHITECTURES))}"
        raise CheckpointError(f"{where}: unknown architecture {name!r}; {hint}")
    return name


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a key that changes the maths and is not built: better that than other logits."""
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"{where}: {key}=true is not supported; only models without biases work")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{where}: quantization_config: quantised weights cannot be trained; use the model's unquantised release"
        )
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{where}: hidden_act={activation!r} is not supported; only silu works")
    other = sorted({str(kind) for kind in config.get("layer_types") or [] if kind != "full_attention"})
    windowed = config.get("use_sliding_window") and config.get("max_window_layers", 0) < _count(
        config, "num_hidden_layers", where
    )
    if other or windowed:
        found = f"layer_types has {', '.join(other)}" if other else "use_sliding_window=true"
        raise CheckpointError(
            f"{where}: {found}; only full attention works (set use_sliding_window=false if the model was trained "
            "without it)"
        )


def _count(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise CheckpointError(f"{where}: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} must be a whole number above 0, got {value!r}")
    return value


def _positive(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"{where}: key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{where}: {key} must be a number above 0, got {value!r}")
    return float(value)
