"""The command line as users and scripts rely on it: verbs, help, spellings, messages and exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_replay import cli, cli_args
from megatron_replay.config import RunConfig
from megatron_replay.errors import DataError

VERBS = [
    *("doctor", "convert", "collect", "store", "train", "evaluate", "compare", "average", "ablate", "generate"),
    *("launch", "demo"),
]


class Stage:
    """A stand-in for the module of a verb: remembers how it was called."""

    def __init__(self, result: object = None) -> None:
        self.result = result
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def run(self, *args: Any, **kwargs: Any) -> object:
        self.args, self.kwargs = args, kwargs
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    @property
    def config(self) -> RunConfig:
        assert isinstance(self.args[0], RunConfig)
        return self.args[0]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Every verb leads here instead of to its module."""
    made = Stage()
    module = types.SimpleNamespace(run=made.run)
    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=lambda name: module))
    return made


def wrong(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run what must be refused; returns its one line."""
    assert cli.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_answers_at_once_and_imports_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; from megatron_replay.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'megatron.core', 'numpy') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    took = []
    while not took or (min(took) >= 1.0 and len(took) < 3):  # a busy machine may be slow once
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        took.append(time.perf_counter() - began)
        assert done.returncode == 0 and done.stdout.strip()
        assert done.stderr.strip() == "[]"
    assert min(took) < 1.0, f"took {min(took):.2f} s"


def test_help_lists_every_verb_key_and_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"\n  {verb} " in listed for verb in VERBS)
    cli.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "train.save_interval=unset" in text and "Steps between checkpoints" in text
    assert "optimizer.betas=unset" in text and "[0.9, 0.95]" in text
    assert re.search(r"train\.loss=restricted +restricted \| (\w+ \| )*full\b", text)
    assert "--ranks N" in text and "--dry-run" in text
    assert all(f"--{flag}" in text for flag in cli_args.ALIASES)
    assert max(map(len, text.splitlines())) <= cli_args.WIDTH


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_names_no_file_that_only_the_repository_has(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([verb, "--help"] if verb else ["--help"])
    text = capsys.readouterr().out
    assert text and not re.findall(r"\b(?:docs|examples|benchmarks|tools|tests|csrc|docker)/\S*|\S+\.(?:md|py)\b", text)
    assert not re.search(r"[.,;:] {2,}\w", text), "a text of several lines becomes one paragraph"


def test_the_installed_command_and_python_m_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_replay", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "megatron-replay 0.1.0\n"


@pytest.mark.parametrize(
    ("spelled", "section", "key", "value"),
    [
        ("--tensor-model-parallel-size 4", "layout", "tensor", 4),
        ("--tensor-model-parallel-size=4", "layout", "tensor", 4),
        ("--pipeline-model-parallel-size 2", "layout", "pipeline", 2),
        ("--sequence-parallel", "layout", "sequence_parallel", True),
        ("layout.zero1=false --use-distributed-optimizer", "layout", "zero1", True),
        ("--micro-batch-size 2", "batch", "micro", 2),
        ("--global-batch-size 32", "batch", "total", 32),
        ("--seq-length 128", "data", "seq_length", 128),
        ("--train-iters 7", "train", "iters", 7),
        ("--load a/b", "train", "load", "a/b"),
        ("--save c", "train", "save", "c"),
        ("--save-interval 5", "train", "save_interval", 5),
        ("--log-interval 3", "train", "log_interval", 3),
        ("--lr 1e-4", "optimizer", "lr", 1e-4),
        ("--min-lr 1e-6", "schedule", "min_lr", 1e-6),
        ("--lr-decay-style linear", "schedule", "style", "linear"),
        ("--lr-warmup-iters 9", "schedule", "warmup_iters", 9),
        ("--weight-decay 0.2", "optimizer", "weight_decay", 0.2),
        ("--clip-grad 0.5", "optimizer", "clip_grad", 0.5),
        ("--adam-beta1 0.8", "optimizer", "betas", (0.8, 0.95)),
        ("--adam-beta2 0.99", "optimizer", "betas", (0.9, 0.99)),
        ("--adam-beta1 0.8 --adam-beta2=0.99", "optimizer", "betas", (0.8, 0.99)),
        ("--adam-beta1 0.8 optimizer.betas=[0.5,0.6]", "optimizer", "betas", (0.5, 0.6)),
        ("optimizer.betas=[0.5,0.6] --adam-beta1 0.8", "optimizer", "betas", (0.8, 0.6)),
        ("--seed 1", "", "seed", 1),
        ("--bf16", "", "precision", "bf16"),
        ("--device cpu", "", "device", "cpu"),
    ],
)
def test_a_megatron_spelling_sets_our_key(stage: Stage, spelled: str, section: str, key: str, value: object) -> None:
    assert cli.main(["train", *spelled.split()]) == 0
    assert getattr(getattr(stage.config, section) if section else stage.config, key) == value


def test_every_spelling_leads_to_a_key_that_exists(stage: Stage) -> None:
    for flag, key in cli_args.ALIASES.items():
        value = (
            []
            if "=" in key
            else ["linear"]
            if flag == "lr-decay-style"
            else ["cpu"]
            if flag == "device"
            else ["0.5"]
            if "beta" in flag
            else ["16"]
        )
        assert cli.main(["train", f"--{flag}", *value]) == 0, flag


def test_file_then_overrides_then_flags_the_last_one_wins(stage: Stage, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\nlayout: {tensor: 2, pipeline: 2}\nbatch: {total: 8}\n")
    cli.main(["collect", str(file), "layout.tensor=4", "--global-batch-size", "64", "batch.total=32"])
    assert (stage.config.seed, stage.config.layout.tensor, stage.config.layout.pipeline, stage.config.batch.total) == (
        1,
        4,
        2,
        32,
    )


def test_optimizer_options_pass_through(stage: Stage) -> None:
    cli.main(["train", "optimizer.max_angle=60"])
    assert stage.config.optimizer.options == {"max_angle": 60}


def test_each_verb_calls_its_function_as_agreed(stage: Stage) -> None:
    for argv, positional, kwargs in [
        (["doctor"], (), {"as_json": False, "ops": False}),
        (["doctor", "--json", "--ops"], (), {"as_json": True, "ops": True}),
        (["convert", "hf", "out", "--verify"], ("hf", "out"), {"verify": True}),
        (["collect", "--dry-run"], (), {"dry_run": True}),
        (["train"], (), {"dry_run": False}),
        (["evaluate"], (), {}),
        (["generate"], (), {}),
        (["demo", "--tiny"], (), {"tiny": True}),
    ]:
        assert cli.main(argv) == 0
        assert stage.args == (RunConfig(), *positional) and stage.kwargs == kwargs, argv
    assert (
        cli.main(["launch", "--ssh", "--node-rank=1", "c.yaml", "devices=2", "train", "seed=7", "--dry-run", "--bf16"])
        == 0
    )
    assert stage.args == (
        RunConfig(seed=7, precision="bf16"),
        ["train", "seed=7", "--dry-run", "--bf16"],
        "c.yaml",
        ["devices=2"],
    )
    assert stage.kwargs == {"dry_run": False, "rank": "1", "ssh": True, "slurm": None}
    cli.main(["store", "export", "a", "b", "--output", "c.jsonl", "--json"])
    assert stage.args == ("export", ["a", "b"]) and stage.kwargs == {"output": "c.jsonl", "as_json": True}
    cli.main(["store", "inspect", "runs/a=b"])
    assert stage.args == ("inspect", ["runs/a=b"]) and stage.kwargs == {"output": None, "as_json": False}


def test_every_verb_names_a_module_of_stages() -> None:
    assert list(cli.VERBS) == VERBS
    assert all(verb.target == f"{name}:run" for name, verb in cli.VERBS.items())


@pytest.mark.parametrize("prompt", ["Once upon a time", "key: value", "1 = one", "true", "a\nb", "[x"])
def test_a_prompt_is_taken_as_it_stands(stage: Stage, prompt: str) -> None:
    assert cli.main(["generate", prompt, "generate.raw=true"]) == 0
    assert stage.config.generate.prompt == prompt and stage.config.generate.raw is True


def test_after_two_dashes_everything_is_a_word(stage: Stage) -> None:
    assert cli.main(["generate", "--seed", "3", "--", "x=1"]) == 0
    assert stage.config.generate.prompt == "x=1" and stage.config.seed == 3


def test_ranks_start_processes_through_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def launch(*args: Any) -> int:
        calls.append(args)
        return 7

    modules = {"megatron_replay.parallel.ranks.spawn": types.SimpleNamespace(launch=launch)}
    monkeypatch.setattr(cli, "importlib", types.SimpleNamespace(import_module=modules.__getitem__))
    assert cli.main(["train", "--ranks", "4", "--device", "cpu"]) == 7
    assert calls == [("megatron_replay.stages.train:run", (RunConfig(device="cpu"),), {"dry_run": False}, 4, "cpu")]


def test_one_rank_is_this_process(stage: Stage) -> None:
    assert cli.main(["train", "--ranks", "1"]) == 0
    assert stage.kwargs == {"dry_run": False}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "needs a verb: doctor"),
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (
            ["train", "--tensor-modle-parallel-size", "4"],
            "unknown flag '--tensor-modle-parallel-size'; did you mean '--tensor-model-parallel-size'?",
        ),
        (["train", "--zzz"], "unknown flag '--zzz'; --help lists the known ones"),
        (["train", "--lr"], "--lr needs a value"),
        (["train", "--lr", "--bf16"], "--lr needs a value"),
        (["train", "--lr", "fast"], "optimizer.lr: expected float, got 'fast'"),
        (["train", "--bf16=yes"], "--bf16 takes no value"),
        (["train", "--adam-beta1", "2"], "optimizer.betas are two numbers in [0, 1), got [2.0, 0.95]"),
        (["train", "--ranks", "0"], "--ranks is a number of processes, at least 1, got '0'"),
        (["train", "--ranks", "two"], "got 'two'"),
        (["doctor", "--ranks", "2"], "unknown flag '--ranks'"),
        (["train", "layuot.tensor=2"], "layuot: unknown key; did you mean 'layout'?"),
        (["train", "layout.tensr=2"], "layout.tensr: unknown key; did you mean 'tensor'?"),
        (["train", "nothing-here"], "'nothing-here' is neither a .yaml file nor section.key=value"),
        (["train", "nothing-here.yaml"], "nothing-here.yaml: cannot read"),
        (["train", "a.yaml", "b.yaml"], "one configuration file at most"),
        (["convert", "only-one"], "needs SOURCE and TARGET"),
        (["generate", "Once", "upon"], "put it in quotes"),
        (["store"], "needs an action: one of inspect"),
        (["store", "verfy", "a"], "unknown action 'verfy'; did you mean 'verify'?"),
        (["store", "stats"], "stats needs the folder of a candidate store"),
        (["store", "stats", "a", "--seed", "1"], "unknown flag '--seed'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], says: str
) -> None:
    line = wrong(capsys, *argv)
    assert says in line
    assert line.startswith(f"megatron-replay {argv[0]}: " if argv and argv[0] in VERBS else "megatron-replay: ")


def test_exit_codes_of_a_verb(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.result = 3
    assert cli.main(["doctor"]) == 3
    stage.result = DataError("run.jsonl:\nline 3 has no prompt")
    assert wrong(capsys, "train") == "megatron-replay train: run.jsonl: line 3 has no prompt"
    stage.result = KeyboardInterrupt()
    assert cli.main(["train"]) == 130
    stage.result = ZeroDivisionError("a fault of ours")
    assert cli.main(["train"]) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "a fault of ours" in err
    stage.result = SystemExit(143)
    with pytest.raises(SystemExit, match="143"):
        cli.main(["train"])


def test_exit_code_2_reaches_the_shell() -> None:
    done = subprocess.run([sys.executable, "-m", "megatron_replay", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "megatron-replay: unknown verb 'trian'; did you mean 'train'?\n"
