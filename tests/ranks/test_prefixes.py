"""Samples that begin alike, computed as a tree and one by one: losses, gradients, likelihoods and candidate sets are
the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import ROWS, Job, Outcome, Whole, candidates, opened, parts, task, whole
from models import LLAMA, QWEN3, draw, write_folder
from pool import fresh
from torch import Tensor

from megatron_replay.candidates import CandidateRule
from megatron_replay.config import Optimizer
from megatron_replay.data import prefixes
from megatron_replay.data.prefixes import lay
from megatron_replay.ops import CandidateSets
from megatron_replay.parallel.batch import DOMAIN, MicroBatch, micro_batches
from megatron_replay.parallel.inference import token_nll
from megatron_replay.parallel.mcore import attention
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import forward, forward_backward
from megatron_replay.parallel.selection import Selection
from megatron_replay.parallel.trainer import StepResult, make_trainer

LOSSES = ("restricted", "full")
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"tensor": 2},
    {"pipeline": 2, "recompute": "selective"},
    {"tensor": 2, "sequence_parallel": True, "recompute": "full"},
    {"replicas": 2},
]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
Truth = dict[str, Whole]


def family(index: int, vocab: int) -> list[np.ndarray]:
    """Samples of one row: two prefixes with three branches each, one of which goes on as two.

    One sample ends with the prefix, one is there twice, and one has no beginning in common with others. One goes on
    with the token that another one has there.
    """
    first, second, middle = (
        draw(length, vocab, "prefix", index, name) for name, length in (("a", 30), ("b", 20), ("c", 17))
    )
    tails = [draw(5 + i, vocab, "tail", index, i) for i in range(6)]
    tails[1][0] = tails[0][0]
    samples = [np.concatenate([first, tail]) for tail in tails[:3]] + [
        np.concatenate([first, middle, tail]) for tail in tails[3:5]
    ]
    return [*samples, *(np.concatenate([second, tail]) for tail in tails[:2]), first, tails[5], samples[1]]


def batches_of(model: Model, micro: int, *, share: bool) -> list[MicroBatch]:
    """This replica's part of four rows; the positions reach from the middle of the prefixes to the end."""
    ours = model.world
    each = ROWS // ours.data_size
    rows = [family(index, model.spec.vocab_size) for index in range(ours.data_rank * each, (ours.data_rank + 1) * each)]
    mine = [list(chain(*rows[i : i + micro])) for i in range(0, each, micro)]
    chosen = [[np.arange(min(12, len(ids) - 2), len(ids) - 1) for ids in samples] for samples in mine]
    sets = [[candidates(ids, at) for ids, at in zip(*pair, strict=True)] for pair in zip(mine, chosen, strict=True)]
    found = micro_batches(mine, chosen, ours.torch_device, multiple=ours.tensor_size, share_prefixes=share)
    for batch, samples in zip(found, mine, strict=True):
        assert (batch.shared > 0.35 * sum(map(len, samples))) == share
    here = [CandidateSets.cat(some).local(vocab_shard(model)) for some in sets]
    return [replace(batch, sets=some) for batch, some in zip(found, here, strict=True)]


def gradients(job: Job, share: bool) -> dict[str, Outcome]:
    """On a rank: sum of losses and gradients of one batch, for each loss."""
    found = {}
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        for loss in LOSSES:
            trainer.wrapped.zero_grad_buffer()
            sums = forward_backward(
                model, trainer.wrapped, batches_of(model, job.micro, share=share), task(model, loss), trainer.timers
            )
            total, count = model.world.total(*sums[DOMAIN])
            grads = {
                name: (weight, parameter.main_grad.detach().double().numpy())
                for name, weight, parameter in model.parameters()
            }
            assert grads.keys() == parts(model).keys()
            steps = [StepResult(total / count, int(count), 0.0, True)]
            found[loss] = Outcome(steps, model.world.tensor_rank, model.spec.tied, grads)
    return found


def both(job: Job, share: bool) -> Truth:
    answers = fresh(job.ranks, gradients, job, share)
    return {loss: whole([answer[loss] for answer in answers]) for loss in LOSSES}


def error(ours: Truth, truth: Truth) -> float:
    """Largest difference of losses and gradients."""
    worst = 0.0
    for loss in LOSSES:
        assert ours[loss].steps[0].positions == truth[loss].steps[0].positions > 500
        worst = max(worst, abs(ours[loss].losses[0] - truth[loss].losses[0]))
        for name, grad in truth[loss].weights.items():
            worst = max(worst, float((ours[loss].weights[name] - grad).abs().max()))
    return worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        write_folder(
            tmp_path_factory.mktemp("tiny") / "model", {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": True}
        )
    )


@pytest.fixture(scope="module")
def truths(folder: str) -> dict[torch.dtype, Truth]:
    """One process, every sample by itself."""
    return {dtype: both(Job(folder=folder, dtype=dtype), False) for dtype in TOLERANCE}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradients_are_those_of_the_samples_one_by_one(
    folder: str, truths: dict[torch.dtype, Truth], layout: dict[str, Any], dtype: torch.dtype
) -> None:
    job = Job(folder=folder, dtype=dtype)
    job = job.on(**layout, zero1=False) if layout else job
    assert error(both(job, True), truths[dtype]) < TOLERANCE[dtype]


def test_grouped_query_heads_that_need_padding(tmp_path: Path) -> None:
    job = Job(folder=str(write_folder(tmp_path / "llama", LLAMA)), dtype=torch.float64).on(
        tensor=2, head_multiple=4, zero1=False
    )
    assert error(both(job, True), both(job, False)) < 1e-12


def begins_anew(segments: np.ndarray) -> np.ndarray:
    return np.concatenate([np.arange(length) for length in segments[:, 1]])


def sees_siblings(above: int, siblings: Sequence[int], low: int, high: int) -> Tensor:
    return torch.ones(high - low, above + high, dtype=torch.bool).tril(above + low)


def cuts_one_branch(each: Sequence[Tensor], block: attention.Block) -> Tensor:
    last = block.keys[-1] == len(each) - 1
    return torch.cat([each[i].detach() if last and i == block.keys[0] else each[i] for i in block.keys])[
        : block.visible.shape[1]
    ]


MUTATIONS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a branch counts its positions from nought": (prefixes, "position_ids", begins_anew),
    "a branch sees its siblings": (attention, "visible", sees_siblings),
    "the prefix gets no gradient from one branch": (attention, "gathered", cuts_one_branch),
}


def mutated(job: Job, what: str) -> dict[str, Outcome]:
    owner, name, wrong = MUTATIONS[what]
    setattr(owner, name, wrong)
    return gradients(job, True)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_wrong_tree_would_be_seen(folder: str, truths: dict[torch.dtype, Truth], what: str) -> None:
    answers = fresh(1, mutated, Job(folder=folder), what)
    assert error({loss: whole([answer[loss] for answer in answers]) for loss in LOSSES}, truths[torch.float32]) > 1e-4


def collected(job: Job, share: bool) -> tuple[list[list[int]], list[np.ndarray]]:
    """On a rank: the candidate sets of a batch (last stage; this replica's), and the likelihoods of all samples'
    tokens."""
    with opened(job.folder, job.layout, job.dtype) as model:
        sets: list[list[int]] = []

        rule = CandidateRule(tau=0.3, k_max=100)
        selection = Selection(model, rule, vocab_size=model.spec.vocab_size, chunk_rows=64)

        def keep(*_: Any) -> None:
            found = selection.take()
            sets.extend(part.tolist() for part in np.split(found.ids.numpy(), found.offsets.numpy()[1:-1]))

        forward(model, batches_of(model, job.micro, share=share), selection, consume=keep)
        samples = list(chain(*(family(index, model.spec.vocab_size) for index in range(ROWS))))
        positions = [np.arange(len(ids) - 1) for ids in samples]
        nll = token_nll(
            model, samples, positions, vocab_size=model.spec.vocab_size, row_tokens=128, share_prefixes=share
        )
        return sets, nll


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_candidate_sets_and_likelihoods(folder: str, layout: dict[str, Any]) -> None:
    job = Job(folder=folder)
    ((sets, nll),) = fresh(1, collected, job, False)
    there = job.on(**layout)
    answers = fresh(there.ranks, collected, there, True)
    if there.replicas == 1:
        assert answers[-1][0] == sets
    else:
        assert [*answers[0][0], *answers[1][0]] == sets
    assert len(sets) > 500 and len({len(ids) for ids in sets}) > 5
    for _, ours in answers:
        assert [len(part) for part in ours] == [len(part) for part in nll]
        assert max(float(np.abs(a - b).max()) for a, b in zip(ours, nll, strict=True)) < 1e-5


def naive(query: Tensor, key: Tensor, value: Tensor, where: Sequence[np.ndarray]) -> Tensor:
    """Each sample by itself."""
    out = torch.zeros_like(query)
    for path in where:
        rows = torch.from_numpy(path)
        q, k, v = (x[rows].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        logits = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).masked_fill(
            torch.ones(len(rows), len(rows)).triu(1) > 0, -torch.inf
        )
        out[rows] = (logits.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("block", [1, 7, 64, 256])
def test_attention_in_blocks_is_that_of_each_sample(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    attention._blocks.cache_clear()
    tree = lay(family(0, 250), share_prefixes=True)
    generator = torch.Generator().manual_seed(0)
    shapes = [(len(tree) + 3, heads, 8) for heads in (6, 2, 2)]
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    )
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    answers = []
    for out in (
        attention.attend(query, key, value, torch.from_numpy(tree.segments)),
        naive(query, key, value, tree.where),
    ):
        answers.append([out, *torch.autograd.grad((out * weight).sum(), (query, key, value))])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
    assert not answers[0][0][len(tree) :].any()
    masks = [b.visible.shape for b in attention.blocks(torch.from_numpy(tree.segments), query.device)]
    assert all(rows <= block for rows, _ in masks)
    attention._blocks.cache_clear()
