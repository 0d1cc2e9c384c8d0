"""The demo: a real 135M model and a small NL2SQL task, from collect over train to what was gained and forgotten.

Every phase is the verb a user would call, with the configuration that is written to run.yaml. It runs on ranks of its
own, which give their memory back. The commands that repeat each phase by hand are printed at the end.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_replay import __version__
from megatron_replay.config import RunConfig, build, dump
from megatron_replay.config_file import changed, over
from megatron_replay.demo import base_model
from megatron_replay.demo.report import Clock, report
from megatron_replay.demo.task import GENERAL_TEXT, make_task
from megatron_replay.device import choose
from megatron_replay.parallel.ranks.spawn import launch

RANKS = 2


@dataclass(frozen=True)
class Size:
    """The size of the demo, and the configuration that suits it."""

    train: int
    """Training samples."""
    questions: int
    """Questions about the held-out databases."""
    settings: Mapping[str, Any]


FULL = Size(
    train=400,
    questions=60,
    settings={
        "output": "runs/demo",
        "device": "cpu",
        "data": {"seq_length": 512},
        "collect": {"bucket_samples": 64},
        "optimizer": {"lr": 5e-5},
        "schedule": {"warmup_iters": 4, "min_lr": 5e-6},
        "layout": {"zero1": False},  # gathering a sharded state to save it takes more memory than two ranks save
        "batch": {"total": 2},
        "evaluate": {"max_new_tokens": 48, "batch": 30},
    },
)
TINY = Size(
    train=24,
    questions=4,
    settings={
        "output": "runs/demo-tiny",
        "device": "cpu",
        "data": {"seq_length": 320},
        "collect": {"bucket_samples": 8},
        "optimizer": {"lr": 5e-5},
        "schedule": {"warmup_iters": 1, "min_lr": 5e-6},
        "layout": {"zero1": False},  # gathering a sharded state to save it takes more memory than two ranks save
        "batch": {"total": 2},
        "evaluate": {"max_new_tokens": 24, "batch": 4, "text_tokens": 512},
    },
)


def run(config: RunConfig, *, tiny: bool = False) -> None:
    """Run all phases into `output` (runs/demo, or runs/demo-tiny). Keys set by the user win over the demo's own.

    Writes run.yaml, before.json, after.json, result.json and demo.png beside the store, the checkpoint and the task. A
    store that is there already is used or completed. Raises SystemExit with a phase's exit code when it fails, and the
    errors of `base_model.gguf_file`.
    """
    size = TINY if tiny else FULL
    demo = Demo(settings(config, size), size)
    demo.run()
    demo.report()


def settings(config: RunConfig, size: Size) -> RunConfig:
    """The demo's configuration.

    It has the demo's own values, overridden by the keys of `config` that are not default, overridden by all the paths.
    """
    mine = over(size.settings, changed(config))
    chosen = build(RunConfig, mine)
    out = Path(chosen.output)
    model = chosen.model or str(base_model.converted(base_model.cache_folder()))
    paths = {
        "model": model,
        "data": {"path": str(out / "demo" / "train.jsonl")},
        "collect": {"store": str(out / "store")},
        "train": {"store": str(out / "store"), "save": str(out / "checkpoint")},
        "evaluate": {
            "base": model,
            "text": str(GENERAL_TEXT),
            "targets": str(out / "demo" / "test.jsonl"),
            "nl2sql": str(out / "demo" / "test.jsonl"),
            "databases": str(out / "demo" / "databases"),
            "output": str(out / "before.json"),
        },
    }
    return build(RunConfig, over(changed(chosen), paths))


@dataclass
class Demo:
    config: RunConfig
    size: Size
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        device = choose(self.config.device)
        self.out = Path(self.config.output)
        self.ranks = RANKS if device.name == "cpu" else min(RANKS, device.count())
        asked = self.config.evaluate
        self.after = replace(
            self.config, model=self.config.train.save, evaluate=replace(asked, output=str(self.out / "after.json"))
        )

    def run(self) -> None:
        # forked ranks inherit this number, so that together they use each core once
        torch.set_num_threads(max(1, torch.get_num_threads() // self.ranks))
        with self.clock("model"):
            self._model()
        with self.clock("task"):
            make_task(self.out / "demo", self.config.seed, train=self.size.train, test=self.size.questions)
            (self.out / "run.yaml").write_text(
                f"# megatron_replay {__version__}, the demo\n{dump(self.config)}", encoding="utf-8"
            )
            (self.out / "metrics.jsonl").unlink(missing_ok=True)  # of an earlier demo; training appends
        for phase, verb, config in (
            ("evaluate before", "evaluate", self.config),
            ("collect", "collect", self.config),
            ("train", "train", self.config),
            ("evaluate after", "evaluate", self.after),
        ):
            with self.clock(phase):
                self._launch(f"megatron_replay.stages.{verb}:run", config, ranks=self.ranks)

    def _model(self) -> None:
        """Make the Hugging Face folder, once.

        A rank of its own does it, because threads started here would not outlive a fork.
        """
        cache = base_model.cache_folder()
        ours = base_model.converted(cache)
        if Path(self.config.model) == ours and not ours.exists():
            self._launch("megatron_replay.formats.gguf:import_gguf", base_model.gguf_file(cache), ours, ranks=1)

    def _launch(self, target: str, *args: Any, ranks: int) -> None:
        code = launch(target, args, {}, ranks, self.config.device)
        if code:
            raise SystemExit(code)

    def report(self) -> None:
        about = f"SmolLM2-135M-Instruct, {self.size.train} NL2SQL samples"
        report(self.out, self.clock, self.ranks, about, self.commands())

    def commands(self) -> list[str]:
        """The command of each phase, as a user types it."""
        file = str(self.out / "run.yaml")
        trained = [f"model={self.after.model}", f"evaluate.output={self.after.evaluate.output}"]
        words = (["evaluate", file], ["collect", file], ["train", file], ["evaluate", file, *trained])
        return [shlex.join(["megatron-replay", *line, "--ranks", str(self.ranks)]) for line in words]
