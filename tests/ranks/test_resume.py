"""A run that stops and goes on is the run that never stopped; a faulty checkpoint is reported in one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import LR, MOCLIP, Job, Outcome, Whole, advance, opened, run, same
from models import QWEN3, write_folder
from optimizer_cases import Case, pulled, registered
from pool import fresh

from megatron_replay.config import Optimizer
from megatron_replay.errors import CheckpointError
from megatron_replay.formats import torch_dist
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.trainer import make_trainer

CONFIG = {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": True}
HALF = 3
FOUR = {"tensor": 2, "pipeline": 2}


def stop(job: Job, root: str) -> Outcome:
    """On a rank: do the job's steps and save."""
    with opened(job.folder, job.layout, job.dtype) as model:
        trainer = make_trainer(model, job.optimizer)
        outcome = advance(job, trainer)
        checkpoint.save(Path(root), job.steps, trainer, {"iteration": job.steps, "seed": 7})
        return outcome


def go_on(job: Job, root: str, spoil: bool = True) -> Outcome:
    """On a rank: load, and do the job's steps from where it stopped."""
    with opened(job.folder, job.layout, job.dtype) as model:
        if spoil:
            with torch.no_grad():
                for parameter in model.module.parameters():
                    parameter.fill_(0.5)  # the checkpoint gives every weight
        trainer = make_trainer(model, job.optimizer)
        progress = checkpoint.load(Path(root), trainer)
        assert (progress["iteration"], progress["seed"]) == (job.first, 7)
        return advance(job, trainer)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(folder=str(write_folder(tmp_path_factory.mktemp("tiny"), CONFIG)), steps=2 * HALF)


def halves(before: Job, after: Job, root: Path, spoil: bool = True) -> Whole:
    """The two halves of a job, each on its own ranks; `spoil` the weights the second starts from."""
    first = run(dataclasses.replace(before, steps=HALF), stop, str(root))
    second = run(dataclasses.replace(after, first=HALF, steps=HALF), go_on, str(root), spoil)
    return Whole([*first.steps, *second.steps], second.weights)


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ({}, torch.float32),
        (FOUR, torch.float32),
        ({"replicas": 2}, torch.float32),
        ({"replicas": 2}, torch.bfloat16),
        ({"replicas": 2, "zero1": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    job: Job, tmp_path: Path, layout: dict[str, Any], dtype: torch.dtype
) -> None:
    there = dataclasses.replace(job, dtype=dtype).on(**layout)
    straight, resumed = run(there), halves(there, there, tmp_path)
    assert resumed.steps == straight.steps
    assert all(torch.equal(resumed.weights[name], straight.weights[name]) for name in straight.weights)


@pytest.fixture(scope="module")
def four(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Whole]:
    """A checkpoint of TP2 x PP2 after half the steps."""
    root = tmp_path_factory.mktemp("four")
    return root, run(dataclasses.replace(job, steps=HALF).on(**FOUR), stop, str(root))


@pytest.mark.parametrize("layout", [{}, {"tensor": 4}, {"replicas": 2}, {"pipeline": 2, "replicas": 2}], ids=str)
def test_a_checkpoint_goes_on_on_any_layout(job: Job, four: tuple[Path, Whole], layout: dict[str, Any]) -> None:
    root, first = four
    second = run(dataclasses.replace(job.on(**layout), first=HALF, steps=HALF), go_on, str(root))
    same(Whole([*first.steps, *second.steps], second.weights), run(job))


def test_without_zero1_too(job: Job, tmp_path: Path) -> None:
    there = job.on(tensor=2, zero1=False)
    same(halves(there, job.on(pipeline=2, zero1=False), tmp_path), run(job))


CASES = {**registered(LR), "moclip-pull": pulled("moclip", LR)}


def other(name: str, **options: Any) -> Optimizer:
    return dataclasses.replace(MOCLIP, name=name, options=options)


@pytest.mark.matrix(2)
@pytest.mark.parametrize("zero1", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_optimizer_resumes_bit_for_bit(job: Job, tmp_path: Path, case: Case, zero1: bool) -> None:
    there = dataclasses.replace(job, optimizer=case.config).on(replicas=2, zero1=zero1)
    straight, resumed = run(there), halves(there, there, tmp_path, spoil="pull" not in case.options)
    assert all(torch.equal(resumed.weights[name], straight.weights[name]) for name in straight.weights)


@pytest.mark.matrix(1)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("after", [{}, {"tensor": 2, "replicas": 2}], ids=str)
def test_their_states_reshard(job: Job, tmp_path: Path, case: Case, after: dict[str, Any]) -> None:
    there = dataclasses.replace(job, optimizer=case.config)
    # a sign or a small singular value turns rounding into a visible step of few weights
    resharded = halves(there.on(**FOUR), there.on(**after), tmp_path, spoil="pull" not in case.options)
    same(resharded, run(there), 1e-5, strays=60)


def test_checkpoints_move_between_adamw_and_moclip(job: Job, tmp_path: Path) -> None:
    """The state is Adam's: MoClip goes on from AdamW's state to the bit.

    At 90 degrees it goes on as Adam-atan2 does.
    """
    adamw, atan2 = (dataclasses.replace(job, optimizer=other(name)) for name in ("adamw", "adam_atan2"))
    moclip = dataclasses.replace(job, optimizer=other("moclip", max_angle=90.0))
    run(dataclasses.replace(adamw, steps=HALF).on(**FOUR), stop, str(tmp_path))
    on = [
        run(dataclasses.replace(kind, first=HALF, steps=HALF).on(**FOUR), go_on, str(tmp_path))
        for kind in (atan2, moclip)
    ]
    assert all(torch.equal(on[0].weights[name], on[1].weights[name]) for name in on[0].weights)


def test_what_a_killed_save_left_does_not_matter(job: Job, four: tuple[Path, Whole], tmp_path: Path) -> None:
    """An unfinished folder of a later iteration is not loaded, and the next save of that iteration replaces it."""
    root = shutil.copytree(four[0], tmp_path / "root")
    unfinished = root / "iter_0000006"
    unfinished.mkdir()
    (unfinished / "__0_0.distcp").write_bytes(b"half a fi")
    run(dataclasses.replace(job, first=HALF, steps=HALF), go_on, str(root))
    run(job, stop, str(root))
    assert torch_dist.resolve(root) == unfinished
    assert not (unfinished / "__0_0.distcp").read_bytes().startswith(b"half")
    run(dataclasses.replace(job, first=2 * HALF, steps=1), go_on, str(root))


def refusal(job: Job, root: str) -> str:
    """On a rank: what loading says."""
    try:
        go_on(job, root)
    except CheckpointError as err:
        return str(err)
    return "loaded"


def refused(job: Job, root: Path, *words: str) -> None:
    for said in fresh(job.ranks, refusal, dataclasses.replace(job, first=HALF, steps=1), str(root)):
        assert "\n" not in said and all(word in said for word in words), said


@pytest.fixture
def root(four: tuple[Path, Whole], tmp_path: Path) -> Path:
    return Path(shutil.copytree(four[0], tmp_path / "root"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["__0_0.distcp", "__3_0.distcp", ".metadata", "common.pt", "metadata.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink], ids=["cut", "missing"])
def test_damage_is_told_in_one_line(job: Job, root: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(root / "iter_0000003" / name)
    refused(job, root, "iter_0000003")


def test_another_run_s_settings_are_refused(job: Job, root: Path) -> None:
    refused(
        dataclasses.replace(job, optimizer=other("muon")),
        root,
        "written by MoClip",
        "Muon cannot go on",
        "iter_0000003",
    )
    refused(job.on(zero1=False), root, "layout.zero1=True", "layout.zero1=False")


def test_another_model_is_refused(job: Job, root: Path, tmp_path: Path) -> None:
    wider = write_folder(tmp_path / "wider", {**CONFIG, "intermediate_size": 96})
    refused(
        dataclasses.replace(job, folder=str(wider)),
        root,
        "iter_0000003",
        "mlp.linear_fc1",
        "[2, 128, 48]",
        "[2, 192, 48]",
    )
    untied = write_folder(tmp_path / "untied", {**CONFIG, "tie_word_embeddings": False})
    refused(dataclasses.replace(job, folder=str(untied)), root, "iter_0000003", "output_layer.weight", "missing")


def test_a_model_without_optimizer_state_is_refused(job: Job, tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(CONFIG)
    torch_dist.write_model(
        tmp_path / "iter_0000000",
        WeightTable(spec),
        lambda weight: torch.zeros(weight.shape),
        dtype=torch.float32,
    )
    (tmp_path / torch_dist.LATEST).write_text("0")
    refused(job, tmp_path, "without optimizer state", "model=")


def test_another_program_s_checkpoint_is_refused(job: Job, root: Path) -> None:
    """megatron's own trainer writes the same format, without our progress."""
    path = root / "iter_0000003" / "common.pt"
    common = torch.load(path)
    del common["progress"]
    torch.save(common, path)
    refused(job, root, "not written by `train`", "model=")


def run_folder(path: Path) -> Path:
    """A model with a byte tokenizer, and data: all that the verb `train` reads."""
    tokenizers = pytest.importorskip("tokenizers")
    write_folder(path, {**CONFIG, "vocab_size": 300})
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    lines = [{"prompt": f"{n} times {m} is ", "completion": f"{n * m}."} for n in range(2, 8) for m in range(3, 9)]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def train_command(folder: Path, *options: str) -> list[str]:
    keys = [
        f"model={folder}",
        f"data.path={folder / 'data.jsonl'}",
        "data.seq_length=48",
        "batch.total=4",
        "device=cpu",
        "train.loss=full",
    ]
    keys += ["train.iters=40", "optimizer.lr=1e-4", "train.tensorboard=false", "schedule.warmup_iters=5"]
    return [sys.executable, "-m", "megatron_replay", "train", *keys, *options, "--ranks", "2"]


def metrics(folder: Path) -> list[dict[str, float]]:
    """Iteration, loss, gradient norm and learning rate of each line of metrics.jsonl.

    A line still being written is left out.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    kept = ("iteration", "lm loss", "grad-norm", "learning-rate", "moclip/angle_mean")
    return [{key: row.get(key, 0.0) for key in kept} for row in map(json.loads, lines)]


def finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sigterm_saves_and_the_next_command_goes_on(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "model")
    out, saved = tmp_path / "out", tmp_path / "saved"
    command = train_command(folder, f"output={out}", f"train.save={saved}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while len(metrics(out)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    stopped = int((saved / torch_dist.LATEST).read_text())
    assert 3 <= stopped < 40 and f"stopped by signal 15 after iteration {stopped}, saved" in said
    assert torch_dist.resolve(saved).name == f"iter_{stopped:07d}"
    assert "Traceback" not in errors

    assert f"at iteration {stopped}" in finish([*command, f"train.load={saved}"])
    finish(train_command(folder, f"output={tmp_path / 'straight'}"))
    assert metrics(out) == metrics(tmp_path / "straight"), "the two parts are the run that was not stopped, bit for bit"
    assert len(metrics(out)) == 40 and (saved / torch_dist.LATEST).read_text() == "40"
