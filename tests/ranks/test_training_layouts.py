"""Ten optimizer steps on every layout against one process: loss, gradient norm, angles and final weights."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import LR, Job, Outcome, Whole, advance, batch_of, differences, opened, run, same, task, train, whole
from models import QWEN3, tied_and_untied
from pool import fresh

from megatron_replay.formats.llama2c import import_llama2c
from megatron_replay.models.weights import OUTPUT, Weight
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.mcore import optimizer
from megatron_replay.parallel.ranks.world import World
from megatron_replay.parallel.trainer import Trainer, make_trainer

SMALL = {**QWEN3, "num_hidden_layers": 2}
TRUTHS: dict[tuple[str, bool], Whole] = {}
"""Loss, tied -> the run of one process, done once."""
RESTRICTED = [
    (True, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    (True, {"replicas": 2}),
    (True, {"tensor": 2}),
    (True, {"tensor": 2, "stripe": False}),
    (False, {"stripe": True}),
    (True, {"tensor": 4, "sequence_parallel": True, "recompute": "selective"}),
    (True, {"pipeline": 2}),
    (False, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"}),
    (False, {"replicas": 2, "zero1": False}),
    (False, {"pipeline": 2, "replicas": 2}),
]
FULL = [
    (True, {"tensor": 4}),
    (True, {"tensor": 2, "replicas": 2}),
    (False, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    (False, {"pipeline": 2, "recompute": "selective"}),
    (True, {"tensor": 2, "pipeline": 2, "stripe": False}),
    (True, {"pipeline": 2, "stripe": True}),
]
STORIES: list[tuple[str, dict[str, Any], torch.dtype, float, int]] = [
    ("restricted", {"tensor": 2, "pipeline": 2, "zero1": False}, torch.float64, 1e-12, 0),
    ("full", {"tensor": 2, "replicas": 2}, torch.float32, 1e-5, 5),
]
"""Loss, layout, precision, tolerance, and how many of the 260,000 weights may stray."""
CASES = [("restricted", *case) for case in RESTRICTED] + [("full", *case) for case in FULL]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    return tied_and_untied(tmp_path_factory.mktemp("tiny"), SMALL)


def truth(folders: dict[bool, str], loss: str, tied: bool) -> Whole:
    if (loss, tied) not in TRUTHS:
        TRUTHS[loss, tied] = run(Job(folder=folders[tied], loss=loss))
    return TRUTHS[loss, tied]


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("loss", "tied", "layout"), CASES, ids=str)
def test_ten_steps_are_those_of_one_process(
    folders: dict[bool, str], loss: str, tied: bool, layout: dict[str, Any]
) -> None:
    same(run(Job(folder=folders[tied], loss=loss).on(**layout)), truth(folders, loss, tied))


def test_what_is_compared_is_not_trivial(folders: dict[bool, str]) -> None:
    found = truth(folders, "restricted", True)
    assert len(found.steps) == 10 and all(step.applied and step.positions > 20 for step in found.steps)
    assert all(norm > 1.0 for norm in found.norms), "the gradient is clipped at 1"
    assert {step.metrics["moclip/clipped"] for step in found.steps[1:]} == {0.0, 1.0}, (
        "the cap acts in some steps and not in others"
    )
    start = whole(fresh(1, train, Job(folder=folders[True], steps=0)))
    assert min(float((found.weights[name] - start.weights[name]).abs().max()) for name in start.weights) > 1e-4, (
        "every tensor moves"
    )


@pytest.mark.slow
def test_eight_ranks(folders: dict[bool, str]) -> None:
    same(
        run(Job(folder=folders[True]).on(tensor=4, pipeline=2, sequence_parallel=True)),
        truth(folders, "restricted", True),
    )


@pytest.mark.slow
def test_in_double_precision_layouts_agree_to_rounding(folders: dict[bool, str]) -> None:
    """Double precision shows what fp32 would hide in its rounding."""
    job = Job(folder=folders[True], dtype=torch.float64, steps=4)
    same(run(job.on(tensor=2, pipeline=2, replicas=2, sequence_parallel=True, zero1=False)), run(job), tolerance=1e-12)


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_change_a_step(folders: dict[bool, str], micro: int) -> None:
    same(run(Job(folder=folders[True], loss="full", micro=micro)), truth(folders, "full", True), tolerance=2e-6)


def test_stories_260k(shared_file: Callable[[str], Path], tmp_path: Path) -> None:
    """A trained Llama: five layers, eight query and four key/value heads.

    Its weights alone count, so any tokenizer of its size will do.
    """
    stand_in = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(chr(0x4E00 + i) for i in range(253)),
    ]
    entries = [struct.pack("<fi", -i, len(token.encode())) + token.encode() for i, token in enumerate(stand_in)]
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 9) + b"".join(entries))
    folder = import_llama2c(shared_file("base_tiny/stories260K.bin"), tmp_path / "tokenizer.bin", tmp_path / "stories")
    for loss, layout, dtype, tolerance, strays in STORIES:
        job = Job(folder=str(folder), loss=loss, dtype=dtype)
        same(run(job.on(**layout)), run(job), tolerance, strays)


def step_sizes(job: Job) -> Outcome:
    """On a rank: the job in bf16; checks what the optimizer updates."""
    with opened(job.folder, job.layout, torch.bfloat16) as model:
        trainer = make_trainer(model, job.optimizer)
        mains = [param for group in trainer.inner.param_groups for param in group["params"]]
        assert mains and all(main.dtype == torch.float32 for main in mains)
        before = [main.clone() for main in mains]
        outcome = advance(job, trainer)
        assert all(not torch.equal(main, start) for main, start in zip(mains, before, strict=True) if main.numel() > 64)
        assert all(param.dtype == torch.bfloat16 for param in model.module.parameters())
        return outcome


@pytest.mark.parametrize("layout", [{"replicas": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_bf16_with_fp32_main_weights(folders: dict[bool, str], layout: dict[str, Any]) -> None:
    job = Job(folder=folders[True], steps=4)
    alone = dataclasses.replace(job, micro=job.on(**layout).micro)
    found = differences(run(job.on(**layout), step_sizes), run(alone, step_sizes))
    bound = 3e-3 if "tensor" in layout else 1e-5  # tensor ranks round their partial sums to bf16
    assert found["loss"] < bound and found["norm"] < 10 * bound and found["weights"] <= 2**-7, found  # a bf16 step


@dataclasses.dataclass
class Broken:
    """A rank's view of a run in which one loss on one rank was not a number."""

    applied: list[bool]
    skipped: int
    untouched: bool
    outcome: Outcome


def with_nan(job: Job, at: tuple[int, int], bad: float) -> Broken:
    """On a rank: an extra step whose losses are `bad` on (tensor rank, data rank) alone, before the job's second
    half."""
    half = dataclasses.replace(job, steps=job.steps // 2)
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, job.optimizer)
        first = advance(half, trainer)
        loss = task(model, job.loss)
        mine = (model.world.tensor_rank, model.world.data_rank) == at

        def poisoned(batch: MicroBatch, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return loss(batch, hidden, weight) * (bad if mine else 1.0)

        before = frozen(trainer)
        result = trainer.step(batch_of(model, 99, job.micro), poisoned, LR)
        untouched = all(torch.equal(a, b) for a, b in zip(before, frozen(trainer), strict=True))
        rest = advance(dataclasses.replace(half, first=half.steps), trainer)
        outcome = dataclasses.replace(rest, steps=[*first.steps, *rest.steps])
        return Broken([result.applied], trainer.inner.skipped, untouched, outcome)


def frozen(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of all that a skipped step must leave alone: weights, main weights, optimizer state and step counts."""
    groups = trainer.inner.param_groups
    held = [*trainer.model.module.parameters(), *(param for group in groups for param in group["params"])]
    held += [tensor for state in trainer.inner.state.values() for tensor in state.values()]
    return [tensor.detach().clone() for tensor in held] + [torch.tensor(group["step"]) for group in groups]


@pytest.mark.parametrize(
    ("layout", "at", "bad"),
    [
        ({"tensor": 2, "pipeline": 2}, (1, 0), math.nan),
        ({"replicas": 2}, (0, 1), math.inf),
        ({"replicas": 2, "zero1": False}, (0, 0), math.nan),
    ],
    ids=str,
)
def test_a_loss_that_is_no_number_on_one_rank_skips_the_step_on_all(
    folders: dict[bool, str], layout: dict[str, Any], at: tuple[int, int], bad: float
) -> None:
    job = Job(folder=folders[True], steps=4).on(**layout)
    answers = fresh(job.ranks, with_nan, job, at, bad)
    assert [(a.applied, a.skipped, a.untouched) for a in answers] == [([False], 1, True)] * job.ranks
    same(whole([answer.outcome for answer in answers]), run(Job(folder=folders[True], steps=4)))


def counts_every_copy(*_: Any, **__: Any) -> bool:
    return True


def counts_the_tied_head(name: str, weight: Weight, world: World, *, sharded_over_data: bool) -> bool:
    """`counted` without its rule for a tied head on a last stage of its own."""
    return (weight.axis is not None or world.tensor_rank == 0) and (sharded_over_data or world.data_rank == 0)


def forgets_the_first_ranks(name: str, weight: Weight, world: World, *, sharded_over_data: bool) -> bool:
    return weight.axis is not None and name != OUTPUT


def sums_its_own(self: Any, table: torch.Tensor) -> torch.Tensor:
    return table


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "replicated norms counted on every rank": (optimizer, "counted", counts_every_copy),
    "tied head counted beside its embedding": (optimizer, "counted", counts_the_tied_head),
    "replicated norms counted nowhere": (optimizer, "counted", forgets_the_first_ranks),
    "each rank sums its own part": (optimizer.ModelShards, "sum", sums_its_own),
}


def mutated(job: Job, what: str) -> list[float]:
    """On a rank: the gradient norms of the job with one thing wrong."""
    owner, name, wrong = MUTATIONS[what]
    setattr(owner, name, wrong)
    return [step.grad_norm for step in train(job).steps]


@pytest.mark.parametrize(
    ("what", "layout"),
    [
        ("replicated norms counted on every rank", {"tensor": 2}),
        ("replicated norms counted on every rank", {"replicas": 2, "zero1": False}),
        ("tied head counted beside its embedding", {"pipeline": 2}),
        ("replicated norms counted nowhere", {"tensor": 2}),
        ("each rank sums its own part", {"tensor": 2}),
        ("each rank sums its own part", {"pipeline": 2}),
        ("each rank sums its own part", {"replicas": 2}),
    ],
    ids=str,
)
def test_a_wrong_sum_would_be_seen(folders: dict[bool, str], what: str, layout: dict[str, Any]) -> None:
    """The comparisons of this file can fail: each wrong way to count moves the norm far beyond their tolerance."""
    job = Job(folder=folders[True], steps=1)
    (right,) = truth(folders, "restricted", True).norms[:1]
    for (wrong,) in fresh(job.on(**layout).ranks, mutated, job.on(**layout), what):
        assert abs(wrong / right - 1) > 1e-4
