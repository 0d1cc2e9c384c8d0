"""Adapters and half fine-tuning through the command line: trained, resumed, measured, exported; and what cannot work,
in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench
from safetensors.torch import load_file
from served import Done, Served
from tinymodel import SETTINGS, Tiny

Run = Callable[..., Done]
LORA = ["adapter.rank=4", "adapter.alpha=8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapted")


@pytest.fixture(scope="module")
def run(served: Served, tiny: Tiny, folder: Path) -> Run:
    """`run("train", "train.iters=4")`: the command with model, data and SETTINGS filled in."""

    def go(verb: str, *argv: str) -> Done:
        plain = () if verb == "convert" else (f"model={tiny.model}", f"data.path={tiny.data}", *SETTINGS)
        done = served(verb, *plain, *argv, cwd=folder)
        assert done.code == 0, done.out + done.err
        return done

    return go


@pytest.fixture(scope="module")
def trained(run: Run, tiny: Tiny) -> Done:
    """Four steps with an adapter on two ranks, saved at the second and the fourth in lora/."""
    keys = [f"train.store={tiny.store}", "output=out", "train.save=lora", "train.iters=4", "train.save_interval=2"]
    return run("train", *keys, *LORA, "layout.tensor=2", "layout.sequence_parallel=true", "--ranks", "2")


def measured(run: Run, tiny: Tiny, folder: Path, model: str) -> tuple[float, float]:
    run(
        "evaluate",
        f"model={model}",
        f"evaluate.targets={tiny.data}",
        f"evaluate.base={tiny.model}",
        "evaluate.output=found.json",
    )
    found = json.loads((folder / "found.json").read_text())
    return found["targets"]["nll"], found["base"]["relative_l2"]


def test_an_adapter_from_training_to_export(run: Run, trained: Done, tiny: Tiny, folder: Path) -> None:
    line = "linear_fc2: 18 of 34 tensors (0.0332 of 0.0373 million parameters) are frozen, 0.0041 million are trained\n"
    assert trained.out.startswith("adapter of rank 4 on linear_qkv, linear_proj, linear_fc1, " + line), (
        trained.out.splitlines()[0]
    )
    assert trained.out.count("are frozen") == 1
    facts = json.loads((folder / "lora" / "hf" / "source.json").read_text())
    assert facts["adapter"] == {
        "rank": 4,
        "alpha": 8.0,
        "targets": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    }

    out = run("convert", "lora", "merged", "--verify").out
    assert (
        "an adapter of rank 4 merged" in out
        and "verified: 24 tensors equal by sha256" in out
        and "differ by at most 0\n" in out
    )
    base, made = load_file(tiny.model / "model.safetensors"), load_file(folder / "merged" / "model.safetensors")
    assert base.keys() == made.keys()
    matrices = {name for name in base if "_proj" in name}
    assert {name for name in base if not torch.equal(base[name], made[name])} == matrices
    assert all(torch.linalg.matrix_rank(made[name].double() - base[name].double(), atol=1e-4) <= 4 for name in matrices)

    start, at_rest = measured(run, tiny, folder, str(tiny.model))
    (nll, moved), exported = measured(run, tiny, folder, "lora"), measured(run, tiny, folder, "merged")
    assert at_rest == 0 and moved > 1e-3 and nll < start
    assert exported == pytest.approx((nll, moved), rel=1e-5)
    answers = {
        run("generate", f"model={model}", "count from 3", "generate.max_new_tokens=8").out
        for model in ("lora", "merged")
    }
    assert len(answers) == 1


def test_an_adapter_run_goes_on(run: Run, trained: Done, tiny: Tiny, folder: Path) -> None:
    """From its second step, on other ranks, to the same numbers."""
    keys = [f"train.store={tiny.store}", "output=again", "train.load=lora/iter_0000002", "train.iters=4", *LORA]
    run("train", *keys, "layout.pipeline=2", "--ranks", "2")
    first, again = ((folder / name / "metrics.jsonl").read_text().splitlines() for name in ("out", "again"))
    for ours, theirs in zip(map(json.loads, again), map(json.loads, first[2:]), strict=True):
        assert ours["iteration"] == theirs["iteration"] and ours["lm loss"] == pytest.approx(
            theirs["lm loss"], rel=1e-4
        )


def test_a_merged_model_is_trained_further(run: Run, trained: Done, tiny: Tiny, folder: Path) -> None:
    """A checkpoint with an adapter as `model=`: merged first, then an adapter of its own, or none."""
    plain = ["train.loss=full", "train.iters=1", "model=lora"]
    run("train", *plain, "output=second", "train.save=second", "adapter.rank=2", "adapter.targets=[linear_fc2]")
    run("train", *plain, "output=third", "train.save=third")
    assert json.loads((folder / "second" / "hf" / "source.json").read_text())["adapter"]["rank"] == 2
    assert json.loads((folder / "third" / "hf" / "source.json").read_text())["adapter"] is None


def test_half_fine_tuning(run: Run, tiny: Tiny, folder: Path) -> None:
    keys = [f"train.store={tiny.store}", "output=half", "train.save=half", "train.iters=2", "train.freeze_share=0.5"]
    out = run("train", *keys, "layout.pipeline=2", "--ranks", "2").out
    assert out.startswith("train.freeze_share=0.5: 8 of 18 tensors (0.0"), out.splitlines()[0]
    run("convert", "half", "half-hf", "--verify")
    base, made = load_file(tiny.model / "model.safetensors"), load_file(folder / "half-hf" / "model.safetensors")
    still = {name for name in base if torch.equal(base[name], made[name])}
    norms = [name for name in still if "norm" in name]
    assert len(norms) == 4 and "model.norm.weight" not in norms and "model.embed_tokens.weight" not in still
    resumed = run(
        "train",
        *keys[:2],
        "train.load=half",
        "train.iters=3",
        "train.freeze_share=0.5",
        "layout.tensor=2",
        "--ranks",
        "2",
    )
    assert "resumed from half at iteration 2" in resumed.out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["adapter.rank=-1"], "adapter.rank must be at least 1, or 0 for no adapter, got -1"),
        (["adapter.rank=2.5"], "adapter.rank: expected int, got 2.5"),
        (["adapter.rank=1000"], "adapter.rank=1000 is too large: linear_qkv is [128, 32]; give at most 32"),
        (["adapter.rank=4", "adapter.alpha=0"], "adapter.alpha must be a number above 0, got 0.0"),
        (
            ["adapter.rank=4", "adapter.targets=[linear_qvk]"],
            "adapter.targets[0]: 'linear_qvk' is not one of linear_qkv, linear_proj,",
        ),
        (["adapter.rank=4", "adapter.targets=[linear_qvk]"], "did you mean 'linear_qkv'?"),
        (["adapter.rank=4", "adapter.targets=[]"], "adapter.targets is empty; name at least one matrix, or set rank=0"),
        (
            ["adapter.rank=4", "adapter.targets=[linear_fc1, linear_fc1]"],
            "adapter.targets names a matrix twice: linear_fc1, linear_fc1",
        ),
        (["adapter.rnak=4"], "adapter.rnak: unknown key; did you mean 'rank'?"),
        (
            ["train.freeze_share=1"],
            "train.freeze_share is the share of the tensors that stays as it is, in [0, 1), got 1.0",
        ),
        (
            ["train.freeze_share=nan"],
            "train.freeze_share is the share of the tensors that stays as it is, in [0, 1), got nan",
        ),
        (["train.freeze_share=-0.5"], "in [0, 1), got -0.5"),
        (
            ["adapter.rank=4", "train.freeze_share=0.5"],
            "adapter.rank=4 freezes the whole model, so train.freeze_share=0.5 has nothing to",
        ),
        (
            ["adapter.rank=4", "optimizer.name=muonclip"],
            "adapter.rank or train.freeze_share freezes some of them; use another optimizer",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_one_line(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused("train", *argv, out=True)


def test_another_adapter_is_refused(bench: Bench, trained: Done, folder: Path) -> None:
    def said(*argv: Any) -> str:
        return bench.refused("train", "train.iters=5", *argv, out=True)

    lora = folder / "lora"
    assert "was written with adapter={'rank': 4" in said(f"train.load={lora}") and "adapter=None" in said(
        f"train.load={lora}"
    )
    assert "'rank': 8" in said(f"train.load={lora}", "adapter.rank=8", "adapter.alpha=8")
    line = said(f"train.save={lora}", "adapter.rank=8", "adapter.alpha=8")
    assert "its checkpoints have adapter {'rank': 4" in line and "save in another folder" in line
    assert "save in another folder" in said(f"train.save={lora}")
