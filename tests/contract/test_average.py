"""The way back from the command line: base + alpha (mean of trained - base), written and measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench import Bench
from safetensors.torch import load_file
from served import Done, Served
from tinymodel import QWEN3, SETTINGS, Tiny, write_model

Run = Callable[..., Done]
TWO = ["--ranks", "2", "layout.tensor=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("average")


@pytest.fixture(scope="module")
def run(served: Served, tiny: Tiny, folder: Path) -> Run:
    """The command with SETTINGS; two models are trained, a checkpoint and one that is exported too."""

    def go(verb: str, *argv: str, code: int = 0) -> Done:
        done = served(verb, *argv, cwd=folder)
        assert done.code == code, done.out + done.err
        return done

    for seed in ("1", "2"):
        data = [f"model={tiny.model}", f"data.path={tiny.data}", *SETTINGS]
        made = [f"seed={seed}", f"train.save=saved{seed}", f"output=run{seed}"]
        go("train", *data, *made, "train.loss=full", "train.iters=2")
    go("convert", "saved2", "exported2")
    return go


def test_the_model_lies_between(run: Run, tiny: Tiny, folder: Path) -> None:
    run("convert", "saved1", "exported1")
    run("average", str(tiny.model), "saved1", "exported2", "average.alpha=0.25", "average.output=between")
    base, one, two, ours = (
        load_file(path / "model.safetensors")
        for path in (tiny.model, folder / "exported1", folder / "exported2", folder / "between")
    )
    assert ours.keys() == base.keys()
    for name, start in base.items():
        mean = (one[name].double() + two[name].double()) / 2
        torch.testing.assert_close(ours[name].double(), start + 0.25 * (mean - start), rtol=0, atol=1e-7)
    assert (folder / "between" / "tokenizer.json").read_bytes() == (tiny.model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("ranks", [[], TWO], ids=["1 rank", "2 tensor ranks"])
def test_a_sweep_measures_what_the_written_models_have(run: Run, tiny: Tiny, folder: Path, ranks: list[str]) -> None:
    measure = [f"evaluate.targets={tiny.data}", *SETTINGS]
    sweep = ["average.sweep=[0, 0.5, 1]", "evaluate.output=sweep.json"]
    told = run("average", str(tiny.model), "saved1", *sweep, *measure, *ranks).out
    assert "the way back" in told and "alpha 0.5" in told
    swept = json.loads((folder / "sweep.json").read_text())
    assert [result["alpha"] for result in swept] == [0, 0.5, 1]
    for result, model in zip((swept[0], swept[2]), (str(tiny.model), "saved1"), strict=True):
        run("evaluate", f"model={model}", *measure, "evaluate.output=one.json")
        one = json.loads((folder / "one.json").read_text())
        assert result["targets"]["nll"] == pytest.approx(one["targets"]["nll"], rel=1e-5)
    nll = [result["targets"]["nll"] for result in swept]
    assert nll[0] > nll[1] > nll[2]


def test_refused(bench: Bench) -> None:
    write_model(bench.folder / "wide", {**QWEN3, "intermediate_size": 96})
    assert "needs BASE and MODEL" in bench.refused("average", "model")
    assert "set average.output=PATH to write a model" in bench.refused("average", "model", "model")
    line = bench.refused("average", "model", "wide", "average.output=out")
    assert "wide: is of another shape than model" in line
    assert "nothing to evaluate" in bench.refused("average", "model", "model", "average.sweep=[0.5]")
    assert "alpha must be a finite number" in bench.refused("average", "model", "model", "average.alpha=.nan")
