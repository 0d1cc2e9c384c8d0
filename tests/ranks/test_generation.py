"""Greedy generation with a key/value cache against transformers, and likelihoods against ordinary cross-entropy, on
several layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import opened
from models import QWEN3, tokens, with_transformers
from pool import fresh

from megatron_replay.config import Layout
from megatron_replay.parallel.generation import generate
from megatron_replay.parallel.inference import token_nll

VOCAB = QWEN3["vocab_size"]
PROMPTS = [prompt.tolist() for prompt in tokens((5, 17, 1, 9, 12, 5, 3), VOCAB, "prompts")]
NEW = 24
LAYOUTS: list[tuple[dict[str, Any], int]] = [
    ({}, 1),
    ({"tensor": 2, "sequence_parallel": True}, 1),
    ({"pipeline": 2}, 1),
    ({"tensor": 2, "pipeline": 2}, 1),
    ({}, 2),
]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return str(folder), with_transformers(folder, {**QWEN3, "tie_word_embeddings": True})


@torch.no_grad()
def greedy(model: Any, prompt: list[int], stops: tuple[int, ...], vocab: int = VOCAB) -> list[int]:
    """transformers' continuation by the likeliest of the first `vocab` ids, computed anew for every token: no cache to
    share a mistake."""
    ids = list(prompt)
    for _ in range(NEW):
        token = int(model(torch.tensor([ids])).logits[0, -1, :vocab].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


def continued(folder: str, layout: Layout, batch: int, stops: tuple[int, ...], vocab: int) -> list[list[int]]:
    """On a rank: the continuations of all prompts."""
    with opened(folder, layout) as model:
        return generate(model, PROMPTS, max_new_tokens=NEW, stop_ids=stops, vocab_size=vocab, batch=batch)


@pytest.mark.parametrize(("layout", "replicas"), LAYOUTS, ids=str)
def test_greedy_tokens_are_those_of_transformers(qwen3: tuple[str, Any], layout: dict[str, Any], replicas: int) -> None:
    folder, model = qwen3
    free = [greedy(model, prompt, ()) for prompt in PROMPTS]
    stops = (free[1][4], free[4][11])  # they end some continuations early, and leave others to go on in a thinner batch
    expected = [greedy(model, prompt, stops) for prompt in PROMPTS]
    lengths = [len(tokens) for tokens in expected]
    assert len(set(lengths)) >= 3 and max(lengths) == NEW and len({tuple(tokens) for tokens in free}) == len(PROMPTS)
    ranks = Layout(**layout).tensor * Layout(**layout).pipeline * replicas
    for answer in fresh(ranks, continued, folder, Layout(**layout), 3, stops, VOCAB):
        assert answer == expected


def ended_early(folder: str, layout: Layout, last: int) -> list[list[int]]:
    """On a rank: the continuations, each complete with the first token `last`."""
    with opened(folder, layout) as model:
        return generate(
            model,
            PROMPTS,
            max_new_tokens=NEW,
            stop_ids=(),
            vocab_size=VOCAB,
            batch=3,
            ended=lambda tokens: tokens[-1] == last,
        )


@pytest.mark.parametrize(("layout", "replicas"), LAYOUTS[2:], ids=str)
def test_a_continuation_ends_once_it_is_complete(qwen3: tuple[str, Any], layout: dict[str, Any], replicas: int) -> None:
    folder, model = qwen3
    free = [greedy(model, prompt, ()) for prompt in PROMPTS]
    last = free[1][4]
    expected = [tokens[: tokens.index(last) + 1] if last in tokens else tokens for tokens in free]
    assert len({len(tokens) for tokens in expected}) >= 2
    ranks = Layout(**layout).tensor * Layout(**layout).pipeline * replicas
    for answer in fresh(ranks, ended_early, folder, Layout(**layout), last):
        assert answer == expected


def test_unknown_ids_are_never_generated(qwen3: tuple[str, Any]) -> None:
    """Rows beyond the tokenizer's ids have logits like any other.

    On the second tensor rank some shards have no other rows.
    """
    folder, model = qwen3
    expected = [greedy(model, prompt, (), vocab=100) for prompt in PROMPTS]
    assert expected != [greedy(model, prompt, ()) for prompt in PROMPTS]
    for answer in fresh(2, continued, folder, Layout(tensor=2), 7, (), 100):
        assert answer == expected


def likelihoods(folder: str, layout: Layout, samples: list[np.ndarray], chosen: list[np.ndarray]) -> list[np.ndarray]:
    """On a rank: the negative log-likelihoods of all samples."""
    with opened(folder, layout) as model:
        return token_nll(model, samples, chosen, vocab_size=VOCAB, row_tokens=40)


@pytest.mark.parametrize(("layout", "replicas"), LAYOUTS, ids=str)
def test_likelihoods_are_cross_entropy(qwen3: tuple[str, Any], layout: dict[str, Any], replicas: int) -> None:
    folder, model = qwen3
    samples = tokens((20, 9, 31, 50, 12, 2, 17), VOCAB, "likelihoods")
    chosen = [np.arange(len(ids) // 3, len(ids) - 1) for ids in samples]
    assert len(chosen[5]) == 1, "a sample with one position"
    chosen[1] = chosen[1][:0]
    ranks = Layout(**layout).tensor * Layout(**layout).pipeline * replicas
    for answer in fresh(ranks, likelihoods, folder, Layout(**layout), samples, chosen):
        for ids, positions, found in zip(samples, chosen, answer, strict=True):
            with torch.no_grad():
                logits = model(torch.from_numpy(ids)[None]).logits[0]
            expected = F.cross_entropy(logits[positions], torch.from_numpy(ids[positions + 1]), reduction="none")
            torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)
