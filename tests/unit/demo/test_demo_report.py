"""The demo: whose settings win, which verbs it runs with what, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_replay import cli_args
from megatron_replay.config import RunConfig, build, load
from megatron_replay.demo import base_model as demo_model
from megatron_replay.demo import report as demo_report
from megatron_replay.demo.picture import Bars, draw
from megatron_replay.stages import demo

BEFORE = {
    "text": {"perplexity": 42.7},
    "targets": {"nll": 2.32},
    "nl2sql": {
        "execution": {"value": 0.0, "low": 0.0, "high": 0.09},
        "exact": {"value": 0.0, "low": 0.0, "high": 0.09},
    },
    "base": {"relative_l2": 0.0},
}
AFTER = {
    "text": {"perplexity": 44.1},
    "targets": {"nll": 0.41},
    "nl2sql": {
        "execution": {"value": 0.35, "low": 0.2, "high": 0.5},
        "exact": {"value": 0.3, "low": 0.2, "high": 0.45},
    },
    "base": {"relative_l2": 0.0123},
}


class Phases:
    """Stands for the launcher: notes what was started and leaves the files that the verb would leave."""

    def __init__(self) -> None:
        self.started: list[tuple[str, RunConfig, int]] = []
        self.fails = ""

    def launch(self, target: str, args: tuple[Any, ...], kwargs: dict[str, Any], ranks: int, device: str) -> int:
        verb = target.rpartition(".")[2]
        self.started.append((verb, args[0], ranks))
        if verb == self.fails:
            return 2
        if verb == "train:run":
            lines = [json.dumps({"iteration": i + 1, "lm loss": 2.5 - i / 10}) + "\n" for i in range(20)]
            with open(Path(args[0].output) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.writelines(lines)
        if verb == "evaluate:run":
            trained = args[0].model == args[0].train.save
            Path(args[0].evaluate.output).write_text(json.dumps(AFTER if trained else BEFORE))
        return 0


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> Phases:
    made = Phases()
    monkeypatch.setattr(demo, "launch", made.launch)
    monkeypatch.setattr(demo.torch, "set_num_threads", lambda _: None)
    return made


def small(tmp_path: Path, **keys: Any) -> RunConfig:
    return build(RunConfig, {"model": "some/model", "output": str(tmp_path / "out"), **keys})


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.mark.parametrize("size", [demo.FULL, demo.TINY], ids=["full", "tiny"])
def test_the_users_keys_win_over_the_demos_and_these_over_the_defaults(size: demo.Size) -> None:
    config = demo.settings(
        build(RunConfig, {"optimizer": {"lr": 3e-4, "max_angle": 60}, "collect": {"tau": 0.99}}), size
    )
    assert config.optimizer.lr == 3e-4 and config.optimizer.options == {"max_angle": 60} and config.collect.tau == 0.99
    assert config.data.seq_length == size.settings["data"]["seq_length"] and config.device == "cpu"
    assert config.collect.k_max == RunConfig().collect.k_max
    assert (config.train.loss, config.optimizer.name, config.collect.strategy) == ("restricted", "moclip", "bucket")


def test_everything_lies_under_output_and_the_model_in_the_cache() -> None:
    config = demo.settings(RunConfig(), demo.TINY)
    assert config.output == "runs/demo-tiny" and demo.settings(RunConfig(), demo.FULL).output == "runs/demo"
    mine = [
        config.data.path,
        config.collect.store,
        config.train.store,
        config.train.save,
        config.evaluate.output,
        config.evaluate.databases,
    ]
    assert all(path.startswith("runs/demo-tiny/") for path in mine) and config.collect.store == config.train.store
    assert (
        Path(config.model) == demo_model.converted(demo_model.cache_folder()) and config.evaluate.base == config.model
    )
    assert not Path(config.model).is_relative_to(Path(__file__).resolve().parents[3])


def test_the_phases_are_the_verbs_in_order_with_the_configuration_of_run_yaml(tmp_path: Path, phases: Phases) -> None:
    demo.run(small(tmp_path), tiny=True)
    assert [verb for verb, _, _ in phases.started] == ["evaluate:run", "collect:run", "train:run", "evaluate:run"]
    assert {ranks for _, _, ranks in phases.started} == {2}
    written = load(RunConfig, tmp_path / "out" / "run.yaml")
    before, collect, train, after = (config for _, config, _ in phases.started)
    assert before == collect == train == written
    assert after.model == written.train.save and after.evaluate.base == written.model
    assert len((tmp_path / "out" / "demo" / "train.jsonl").read_text().splitlines()) == demo.TINY.train
    assert len((tmp_path / "out" / "demo" / "test.jsonl").read_text().splitlines()) == demo.TINY.questions
    assert all(Path(path).exists() for path in (written.evaluate.text, written.evaluate.databases, written.data.path))


def test_the_printed_commands_are_the_phases(
    tmp_path: Path, phases: Phases, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run(small(tmp_path), tiny=True)
    printed = [
        shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  megatron-replay ")
    ]
    assert [words[1] + ":run" for words in printed] == [verb for verb, _, _ in phases.started]
    for words, (_, config, ranks) in zip(printed, phases.started, strict=True):
        given = cli_args.read(words[2:], {"ranks": True})
        assert cli_args.configuration(given.words[0], given.overrides) == config and given.flags == {
            "ranks": str(ranks)
        }


def test_it_leaves_numbers_and_a_picture_and_prints_the_table(
    tmp_path: Path, phases: Phases, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run(small(tmp_path), tiny=True)
    demo.run(small(tmp_path), tiny=True)  # again in the same place: the loss curve is the last run's alone
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["before"] == BEFORE and result["after"] == AFTER
    assert result["losses"] == pytest.approx([2.5 - i / 10 for i in range(20)])
    assert list(result["seconds"]) == ["model", "task", "evaluate before", "collect", "train", "evaluate after"]
    assert 0 < result["peak_bytes"] < 2**40
    assert png_size(tmp_path / "out" / "demo.png") == (1500, 450)
    out = capsys.readouterr().out
    assert "2.32" in out and "-1.91 (-82.3%)" in out and "+35.0 points" in out and "+1.4 (+3.3%)" in out
    assert str(tmp_path / "out" / "demo.png") in out


@pytest.mark.parametrize("verb", ["evaluate:run", "collect:run", "train:run"])
def test_a_phase_that_fails_ends_the_demo_with_its_exit_code(tmp_path: Path, phases: Phases, verb: str) -> None:
    phases.fails = verb
    with pytest.raises(SystemExit) as caught:
        demo.run(small(tmp_path), tiny=True)
    assert caught.value.code == 2 and phases.started[-1][0] == verb
    assert not (tmp_path / "out" / "result.json").exists()


def test_the_model_is_converted_once(tmp_path: Path, phases: Phases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(demo_model, "gguf_file", lambda cache: cache / "file.gguf")
    config = build(RunConfig, {"output": str(tmp_path / "out")})
    demo.run(config, tiny=True)
    first, *_ = phases.started
    assert first == ("gguf:import_gguf", tmp_path / "file.gguf", 1)
    demo_model.converted(tmp_path).mkdir()
    phases.started.clear()
    demo.run(config, tiny=True)
    assert phases.started[0][0] == "evaluate:run"


def test_processor_time_of_ranks_counts(capsys: pytest.CaptureFixture[str]) -> None:
    clock = demo_report.Clock()
    with clock("work"):
        subprocess.run(
            [sys.executable, "-c", "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"],
            check=True,
        )
    assert clock.processor["work"] >= 0.25 and clock.seconds["work"] >= 0.25
    assert "== work" in capsys.readouterr().out


def test_the_picture_is_small_and_bears_zeros(tmp_path: Path) -> None:
    bars = [
        Bars("nothing", 0.0, 0.0),
        Bars("accuracy", 0.0, 35.0, form="{:.0f} %", better="higher"),
        Bars("text", 42.7, 44.1),
    ]
    path = draw(tmp_path / "new" / "demo.png", [2.5 / (1 + i) for i in range(60)], bars, title="a run")
    assert path.stat().st_size < 150_000 and png_size(path) == (1500, 450)
    draw(path, [1.0], bars[:1], title="one step, one measure")


@pytest.mark.slow
def test_the_tiny_demo_learns_within_its_budget(tmp_path: Path) -> None:
    """The real model, the real phases: a home folder of its own stands for a fresh machine."""
    here = demo_model.cache_folder() / demo_model.GGUF
    if here.is_file():
        (tmp_path / ".cache" / "megatron_replay").mkdir(parents=True)
        (tmp_path / ".cache" / "megatron_replay" / demo_model.GGUF).symlink_to(here)
    command = [sys.executable, "-m", "megatron_replay", "demo", "--tiny", f"output={tmp_path / 'out'}"]
    done = subprocess.run(
        command, env={**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if "could not be downloaded" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["after"]["targets"]["nll"] < 0.8 * result["before"]["targets"]["nll"]  # 0.59 when it was measured
    assert result["after"]["text"]["perplexity"] < 1.3 * result["before"]["text"]["perplexity"]
    assert result["peak_bytes"] < 8 * 2**30
    # a busy machine is no slow demo: two quiet cores share the processor time
    assert sum(result["processor_seconds"].values()) / 2 < 120
