"""Half fine-tuning's choice of tensors: balanced, seeded, of the names alone."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.errors import ConfigError
from megatron_replay.optim import half

MATRICES = {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


def names(layers: int) -> list[tuple[str, torch.Tensor]]:
    """Names and parameters as `named_parameters` of a Hugging Face model gives them."""
    found = [("model.embed_tokens.weight", torch.empty(2, 2))]
    for layer in range(layers):
        of = f"model.layers.{layer}"
        found += [
            (f"{of}.{part}.{name}.weight", torch.empty(2, 2))
            for part, matrices in MATRICES.items()
            for name in matrices
        ]
        found += [(f"{of}.{name}_layernorm.weight", torch.empty(2)) for name in ("input", "post_attention")]
    return [*found, ("model.norm.weight", torch.empty(2)), ("lm_head.weight", torch.empty(2, 2))]


def test_half_of_each_kind_in_each_layer() -> None:
    """The paper's fraction: two of four attention matrices, and one norm.

    Of the three MLP matrices it is two in half of the layers and one in the others.
    """
    frozen = half(names(10), 0.5, 1)
    counts = Counter(
        (name.split(".")[2], name.split(".")[3].removesuffix("_layernorm").replace("post_attention", "input"))
        for name in frozen
    )
    assert [counts[str(layer), "self_attn"] for layer in range(10)] == [2] * 10
    assert [counts[str(layer), "input"] for layer in range(10)] == [1] * 10
    assert sorted(counts[str(layer), "mlp"] for layer in range(10)) == [1] * 5 + [2] * 5
    assert len(frozen) == 45, "embeddings, head and the last norm are trained"


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.floats(0, 1, exclude_max=True), st.integers(0, 2**40))
def test_the_share_is_right_to_within_one_tensor_of_each_kind(layers: int, share: float, seed: int) -> None:
    frozen = half(names(layers), share, seed)
    for part, each in [("self_attn", 4), ("mlp", 3), ("layernorm", 2)]:
        assert abs(sum(part in name for name in frozen) - share * each * layers) <= 1
        for layer in range(layers):
            inside = sum(part in name and f".{layer}." in name for name in frozen)
            assert abs(inside - share * each) < 1 + 1e-6


def test_the_choice_is_one_of_names_share_and_seed() -> None:
    given_ = names(4)
    shuffled = random.Random(0).sample(given_, len(given_))
    assert half(given_, 0.5, 3) == half(shuffled, 0.5, 3) == half(((n, t) for n, t in given_), 0.5, 3)
    assert half(given_, 0.5, 3) != half(given_, 0.5, 4)
    assert half(given_, 0.0, 3) == []
    assert half([("layers.0.attn.w", torch.empty(2, 2)), ("layers.0.attn.v", torch.empty(2, 2))], 0.5, 0) == [
        "layers.0.attn.w"
    ], "golden"


def test_each_tensor_is_frozen_about_as_often() -> None:
    counts = Counter(name for seed in range(300) for name in half(names(2), 0.5, seed))
    assert len(counts) == 2 * 9 and all(110 < count < 190 for count in counts.values())


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan"), "half", True])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match=r"share of the tensors to freeze must be in \[0, 1\), got"):
        half(names(1), share)  # type: ignore[arg-type]


def test_it_freezes_any_torch_model() -> None:
    layers = torch.nn.ModuleList([torch.nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)])
    frozen = half(layers.named_parameters(), 0.5, 0)
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(name not in frozen)
    count = sum(not parameter.requires_grad for parameter in layers.parameters())
    assert count == len(frozen) and abs(count - len(list(layers.parameters())) / 2) <= 2
