"""A striped vocabulary is invisible: same sets, losses, weights, text and exports as rows by id, whatever the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from each_loss import NAMES, each_loss
from jobs import LR, Job, Outcome, Whole, advance, differences, opened, run, same, train
from models import QWEN3, tokens, write_folder
from pool import fresh
from test_resume import go_on, stop
from torch import Tensor

from megatron_replay.candidates import CandidateRule
from megatron_replay.config import Layout
from megatron_replay.formats import torch_dist
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import STRIPES, restripe, split
from megatron_replay.ops import (
    CandidateSets,
    VocabShard,
    dynamic_topk,
    linear_cross_entropy,
    restricted_linear_cross_entropy,
)
from megatron_replay.parallel.batch import flatten, row_length
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.generation import generate
from megatron_replay.parallel.losses.restricted import imbalance
from megatron_replay.parallel.mcore.model import Model, squared_distance, vocab_shard
from megatron_replay.parallel.mcore.optimizer import restripe_state
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.sampling import argmax
from megatron_replay.parallel.selection import Selection
from megatron_replay.parallel.trainer import make_trainer

N, V, REAL, H = 16, 384, 301, 8
EXACT = {"atol": 1e-12, "rtol": 1e-12}
SMALL = {**QWEN3, "num_hidden_layers": 2}
BOTH: dict[str, Any] = {"tensor": 2, "pipeline": 2}


# operators


def problem(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    hidden, weight = (torch.randn(n, H, generator=g, dtype=torch.float64) for n in (N, V))
    if kind == "ties":
        hidden, weight = hidden.round(), weight.sign()
    weight[REAL:] = 1e3
    return hidden, weight, torch.randint(REAL, (N,), generator=g)


def mine() -> VocabShard:
    return VocabShard.of_rank(V, dist.group.WORLD, stripes=STRIPES)


def cut(weight: Tensor, shard: VocabShard) -> Tensor:
    return restripe(weight, striped=True)[shard.start : shard.stop].clone()


def striped_sets(kind: str, tau: float, k_max: int) -> CandidateSets:
    hidden, weight, gold = problem(kind)
    shard = mine()
    return dynamic_topk(
        hidden @ cut(weight, shard).t(), gold, tau, k_max, REAL, shard, always=(3, REAL - 1), keep_logits=True
    )


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("kind", ["spread", "ties"])
@pytest.mark.parametrize(("tau", "k_max"), [(0.95, 200), (0.6, 5), (1.0, 1000)])
def test_the_sets_are_those_of_one_rank(ranks, world: int, kind: str, tau: float, k_max: int) -> None:
    hidden, weight, gold = problem(kind)
    truth = dynamic_topk(hidden @ weight.t(), gold, tau, k_max, REAL, always=(3, REAL - 1), keep_logits=True)
    for ours in ranks(world).run(striped_sets, kind, tau, k_max):
        for name in ("offsets", "ids", "gold_slot", "logits"):
            assert torch.equal(getattr(ours, name), getattr(truth, name)), name
        torch.testing.assert_close(ours.outside_mass, truth.outside_mass, rtol=1e-6, atol=1e-14)


def equal_logits() -> list[list[int]]:
    shard = mine()
    sets = dynamic_topk(torch.zeros(2, shard.size), torch.tensor([0, V - 1]), tau=0.75, k_max=300, shard=shard)
    return [sets.ids.tolist(), sets.offsets.tolist()]


def test_massive_ties_are_cut_at_the_same_id(ranks) -> None:
    for ids, offsets in ranks(4).run(equal_logits):
        assert ids == [*range(288), *range(288), V - 1] and offsets == [0, 288, 577]


def striped_losses() -> dict[str, tuple[Tensor, ...]]:
    hidden, weight, gold = problem("spread")
    sets, shard = dynamic_topk(hidden @ weight.t(), gold, 0.9, 30, REAL), mine()
    return each_loss(hidden, cut(weight, shard), sets, gold, shard, torch.arange(1.0, N + 1), real=REAL, chunk_rows=5)


@pytest.mark.parametrize("world", [2, 4])
def test_losses_and_gradients_are_those_of_the_whole(ranks, world: int) -> None:
    hidden, weight, gold = problem("spread")
    sets = dynamic_topk(hidden @ weight.t(), gold, 0.9, 30, REAL)
    found = ranks(world).run(striped_losses)
    for name in NAMES:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        full = name == "full"
        loss = (
            linear_cross_entropy(h, w, gold, vocab_size=REAL) if full else restricted_linear_cross_entropy(h, w, sets)
        )
        dh, dw = torch.autograd.grad((loss * torch.arange(1.0, N + 1)).sum(), (h, w))
        for answer in found:
            torch.testing.assert_close(answer[name][0], loss.detach(), **EXACT)
            torch.testing.assert_close(answer[name][1], dh, **EXACT)
        rows = torch.cat([answer[name][2] for answer in found])
        torch.testing.assert_close(restripe(rows, striped=False), dw, **EXACT)


def likeliest(striped: bool) -> list[list[int]]:
    """Ids 9, 16 and 167 are equal, and lie in other rows than their ids; padding would win."""
    weight = torch.zeros(V, 1)
    weight[[9, 16, 167]] = 2.0
    weight[REAL:] = 5.0
    shard = mine() if striped else VocabShard.of_rank(V, dist.group.WORLD)
    part = cut(weight, shard) if striped else weight[shard.start : shard.stop]
    broken = torch.tensor([[torch.nan]])
    return [
        argmax(torch.tensor([[1.0], [-1.0]]), part, shard, REAL).tolist(),
        argmax(broken, part, shard, REAL).tolist(),
    ]


@pytest.mark.parametrize("striped", [True, False])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_the_likeliest_token_is_the_lowest_id_among_equals(ranks, world: int, striped: bool) -> None:
    assert ranks(world).run(likeliest, striped) == [[[9, 0], [0]]] * world


# the model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    root = tmp_path_factory.mktemp("tiny")
    return {tied: str(write_folder(root / str(tied), {**SMALL, "tie_word_embeddings": tied})) for tied in (True, False)}


def found_sets(folder: str, layout: Layout) -> list[np.ndarray] | None:
    """On a rank: the sets of a few samples, of a head whose rows have one number each.

    So logits tie to the bit on any layout.
    """
    with opened(folder, layout) as model:
        samples = tokens((13, 21, 7), model.spec.vocab_size, "sets")
        length = row_length([sum(map(len, samples))], layout.tensor)
        batch = flatten(samples, [np.arange(len(ids) - 1) for ids in samples], length, model.world.torch_device)
        if model.world.last_stage:
            head = torch.zeros(model.spec.padded_vocab(), model.spec.hidden_size)
            ids = torch.arange(len(head))
            head[ids, ids * 7 % head.shape[1]] = 2.0 ** (ids % 3)
            rows = restripe(head, striped=True) if layout.striped else head
            here = len(head) // layout.tensor
            model.module.output_layer.weight.data.copy_(rows[model.world.tensor_rank * here :][:here])
        rule = CandidateRule(tau=0.9, k_max=60, always=(5, 239))
        selection = Selection(model, rule, vocab_size=240, chunk_rows=8)
        forward(model, [batch], selection, consume=lambda *_: None)
        if model.head is None:
            return None
        sets = selection.take()
        return [getattr(sets, name).numpy() for name in ("offsets", "ids", "gold_slot", "logits")]


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"tensor": 4, "sequence_parallel": True}, BOTH, {"stripe": True}], ids=str
)
def test_stage_0_finds_real_ids_ties_included(folders: dict[bool, str], layout: dict[str, Any]) -> None:
    (truth,) = fresh(1, found_sets, folders[False], Layout())
    assert truth is not None
    offsets, ids, _, logits = truth
    ties = sum(len(some) - len(np.unique(some)) for some in np.split(logits, offsets[1:-1]))
    assert ties > 100 and max(np.diff(offsets)) >= 60 and ids.max() < 240
    ours = [
        sets
        for sets in fresh(
            Layout(**layout).tensor * Layout(**layout).pipeline, found_sets, folders[False], Layout(**layout)
        )
        if sets
    ]
    assert len(ours) == Layout(**layout).tensor
    for sets in ours:
        assert all(np.array_equal(a, b) for a, b in zip(sets[:3], truth[:3], strict=True))


def continued(folder: str, layout: Layout) -> list[list[int]]:
    with opened(folder, layout) as model:
        prompts = [prompt.tolist() for prompt in tokens((5, 9, 1), 250, "prompts")]
        return generate(model, prompts, max_new_tokens=12, stop_ids=(), vocab_size=200, batch=2)


def test_generation_writes_the_same_text(folders: dict[bool, str]) -> None:
    (truth,) = fresh(1, continued, folders[True], Layout())
    for layout in ({"tensor": 4}, BOTH, {"tensor": 2, "stripe": False}, {"stripe": True}):
        there = Layout(**layout)
        assert (
            fresh(there.tensor * there.pipeline, continued, folders[True], there)
            == [truth] * there.tensor * there.pipeline
        )


def moved(job: Job) -> tuple[float, float]:
    with opened(job.folder, job.layout) as model:
        return squared_distance(model, HFFolder(job.folder))


def test_a_loaded_model_is_no_distance_from_its_folder(folders: dict[bool, str]) -> None:
    found = [row for tied in (True, False) for row in fresh(4, moved, Job(folder=folders[tied]).on(**BOTH))]
    assert [row[0] for row in found] == [0.0] * 8 and all(row[1] > 1 for row in found)


def imbalances(job: Job) -> list[float]:
    with opened(job.folder, job.layout) as model:
        found = []
        for ids in ([[0, 1, 2, 3]], [[0, 1, 2, 3], [8, 16, 24]], [[0, 1]], [[0, 128]]):
            sets = CandidateSets.from_lists(ids, [row[0] for row in ids])
            batch = flatten([np.array([1, 2])], [np.array([0])], 2, model.world.torch_device)
            if model.head is not None:
                batch = dataclasses.replace(batch, sets=sets.local(vocab_shard(model)))
            found.append(imbalance(model, [batch, batch]))
        return found


def test_the_imbalance_of_a_step_is_counted(folders: dict[bool, str]) -> None:
    job = Job(folder=folders[True])
    # two ranks: ids that are 0..3 modulo 8 lie on the first, or those below 128 do
    assert fresh(2, imbalances, job.on(tensor=2)) == [[2.0] * 4] * 2
    assert fresh(4, imbalances, job.on(tensor=4)) == [[2.0, 4 * 5 / 7, 4.0, 4.0]] * 4
    assert fresh(4, imbalances, job.on(tensor=2, stripe=False, replicas=2)) == [[2.0, 2.0, 2.0, 1.0]] * 4
    assert fresh(4, imbalances, job.on(**BOTH)) == [[2.0] * 4] * 4
    assert fresh(1, imbalances, job) == [[1.0] * 4]


# checkpoints


def halves(before: Job, after: Job, root: Path) -> Whole:
    first = run(dataclasses.replace(before, steps=3), stop, str(root))
    second = run(dataclasses.replace(after, first=3, steps=3), go_on, str(root))
    return Whole([*first.steps, *second.steps], second.weights)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("tied", "before", "after"),
    [
        (True, {}, {"tensor": 2}),
        (True, {"tensor": 2, "stripe": False}, BOTH),
        (True, BOTH, {"tensor": 2, "stripe": False}),
        (True, {"replicas": 2}, {"tensor": 2, "replicas": 2}),
        (False, {"pipeline": 2, "stripe": True}, {"tensor": 2, "pipeline": 2, "stripe": False}),
        (False, {"tensor": 2, "zero1": False}, {"replicas": 2, "zero1": False}),
        (True, {"pipeline": 2, "replicas": 2, "zero1": False}, {"tensor": 2, "pipeline": 2, "zero1": False}),
    ],
    ids=str,
)
def test_a_run_goes_on_in_the_other_order(
    folders: dict[bool, str], tmp_path: Path, tied: bool, before: dict[str, Any], after: dict[str, Any]
) -> None:
    job = Job(folder=folders[tied], steps=6)
    same(halves(job.on(**before), job.on(**after), tmp_path), run(job))


def test_bf16_and_its_main_weights_go_on_in_the_other_order(folders: dict[bool, str], tmp_path: Path) -> None:
    job = Job(folder=folders[True], steps=6, dtype=torch.bfloat16)
    straight = run(job.on(replicas=2))
    found = differences(halves(job.on(replicas=2), job.on(replicas=2, stripe=True), tmp_path), straight)
    assert found["loss"] < 1e-5 and found["weights"] <= 2**-7, found


def there_and_back(job: Job) -> list[tuple[bool, bool]]:
    """On a rank: (unchanged by a restriping, unchanged by a second one after it) of each vocabulary tensor.

    The tensors are the optimizer's. The second restriping undoes the first.
    """
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, job.optimizer)
        advance(job, trainer)
        params = [param for group in trainer.inner.param_groups for param in group["params"]]
        tensors = [tensor for param in params for tensor in (param, *trainer.inner.state[param].values())]
        before = [tensor.clone() for tensor in tensors]
        flipped = dataclasses.replace(model, table=dataclasses.replace(model.table, striped=not job.layout.striped))
        restripe_state(flipped, trainer.outer, trainer.inner, striped=job.layout.striped)
        once = [tensor.clone() for tensor in tensors]
        restripe_state(model, trainer.outer, trainer.inner, striped=not job.layout.striped)
        return [(torch.equal(a, b), torch.equal(a, c)) for a, b, c in zip(before, once, tensors, strict=True)]


@pytest.mark.parametrize("layout", [{**BOTH, "zero1": False}, {"tensor": 2, "replicas": 2}, {"replicas": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_restriping_there_and_back_changes_no_bit(
    folders: dict[bool, str], layout: dict[str, Any], dtype: torch.dtype
) -> None:
    job = Job(folder=folders[True], steps=2, dtype=dtype).on(**layout)
    answers = fresh(job.ranks, there_and_back, job)
    assert all(back for rank in answers for _, back in rank)
    assert sum(not unmoved for rank in answers for unmoved, _ in rank) >= 3, "weights and both moments of the embedding"


def exported(root: Path, spec: ModelSpec) -> dict[str, Tensor]:
    """The Hugging Face tensors of a checkpoint, as `convert` reads them."""
    reader = torch_dist.Reader(root)
    return {name: tensor for weight in WeightTable(spec) for name, tensor in split(weight, reader.read(weight)).items()}


@pytest.mark.matrix(1)
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_the_folder_bit_for_bit(folders: dict[bool, str], tmp_path: Path, tied: bool) -> None:
    folder = HFFolder(folders[tied])
    for layout in (BOTH, {"tensor": 4}, {"tensor": 2, "stripe": False}, {"stripe": True}):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        run(dataclasses.replace(Job(folder=folders[tied]).on(**layout), steps=0), stop, str(root))
        assert torch_dist.Reader(root).striped == Layout(**layout).striped
        found = exported(root, folder.spec)
        assert all(torch.equal(found[name], folder.read(name)) for name in folder.names())


def test_each_iteration_of_a_folder_knows_its_own_order(folders: dict[bool, str], tmp_path: Path) -> None:
    """A run that began on one rank and went on on two leaves both orders under one roof."""
    job = Job(folder=folders[True])
    run(dataclasses.replace(job, steps=1), stop, str(tmp_path))
    run(dataclasses.replace(job, steps=2).on(tensor=2), stop, str(tmp_path))
    assert [torch_dist.Reader(tmp_path / f"iter_000000{i}").striped for i in (1, 2)] == [False, True]
    one, two = (exported(tmp_path / f"iter_000000{i}", HFFolder(job.folder).spec) for i in (1, 2))
    name = "model.embed_tokens.weight"
    assert float((one[name] - two[name]).abs().max()) < 5 * LR, "one step apart, not another order"


def filled(job: Job, root: str) -> Outcome:
    """On a rank: the weights that a checkpoint gives a model alone."""
    with opened(job.folder, job.layout) as model:
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.fill_(0.5)
        checkpoint.load_model(Path(root), model)
        return advance(dataclasses.replace(job, steps=0), make_trainer(model, job.optimizer))


def test_a_model_is_filled_from_either_order(folders: dict[bool, str], tmp_path: Path) -> None:
    job = Job(folder=folders[True], steps=1)
    for number, layout in enumerate(({}, {"tensor": 2})):
        saved = run(job.on(**layout), stop, str(tmp_path / str(number)))
        for other in (Job(folder=folders[True]), job.on(**BOTH), job.on(tensor=2, stripe=False), job.on(stripe=True)):
            found = run(other, filled, str(tmp_path / str(number)))
            assert all(torch.equal(found.weights[name], saved.weights[name]) for name in saved.weights)


# what a mistake would look like


def by_row(self: VocabShard, ids: Tensor) -> Tensor:
    """`columns` that takes ids for rows."""
    return torch.where((ids >= self.start) & (ids < self.stop), ids - self.start, -1)


padding_of = VocabShard.padding


def at_the_end(self: VocabShard, vocab_size: int | None, device: torch.device) -> Tensor:
    """`padding` as it is where rows lie by id."""
    return padding_of(VocabShard(self.start, self.stop, self.group), vocab_size, device)


MUTATIONS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "gold and candidates not mapped": (VocabShard, "columns", by_row),
    "input not mapped": (Model, "rows_of", lambda self, ids: ids),
    "padding not masked": (VocabShard, "padding", at_the_end),
}


def mutated(job: Job, what: str) -> list[float]:
    owner, name, wrong = MUTATIONS[what]
    setattr(owner, name, wrong)
    return [step.loss for step in train(job).steps]


@pytest.mark.parametrize(
    ("what", "loss"),
    [
        ("gold and candidates not mapped", "restricted"),
        ("gold and candidates not mapped", "full"),
        ("input not mapped", "restricted"),
        ("padding not masked", "full"),
    ],
)
def test_what_is_forgotten_would_be_seen(folders: dict[bool, str], what: str, loss: str) -> None:
    job = Job(folder=folders[True], loss=loss, steps=1)
    right = run(job).losses[0]
    for (wrong,) in fresh(2, mutated, job.on(tensor=2), what):
        assert abs(wrong - right) > 1e-3


def test_an_export_that_is_not_undone_would_be_seen(
    folders: dict[bool, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(dataclasses.replace(Job(folder=folders[True]).on(tensor=2), steps=0), stop, str(tmp_path))
    folder = HFFolder(folders[True])
    monkeypatch.setattr(torch_dist, "restripe", lambda tensor, *, striped: tensor)
    name = "model.embed_tokens.weight"
    assert not torch.equal(exported(tmp_path, folder.spec)[name], folder.read(name))
