"""Stores, checkpoints and folders that cannot be used: one line that names file and way out; exit code 2; nothing
written, nothing lost."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import Bench, Evil, flip, snapshot
from served import ROOT
from tinymodel import QWEN3, write_lines, write_model, write_tokenizer


def test_store_of_another_model(bench: Bench) -> None:
    write_model(bench.folder / "other", QWEN3, seed=7)
    for more in ([], ["--ranks", "2"]):
        line = bench.refused("train", "model=other", *more)
        assert (
            "store: collected with base model " in line
            and "but this run has " in line
            and "use the same, or collect again" in line
        )


def test_store_of_another_tokenizer(bench: Bench) -> None:
    write_tokenizer(bench.model, "<new>")
    assert "store: collected with tokenizer " in bench.refused("train")


def test_store_of_another_template(bench: Bench) -> None:
    (bench.folder / "own.jinja").write_text("{% for m in messages %}{{ m['content'] }}!{% endfor %}")
    assert "store: collected with chat template " in bench.refused("train", "data.template=own.jinja")


@pytest.mark.parametrize("more", [[], ["--ranks", "2"]], ids=["1 rank", "2 ranks"])
def test_a_sample_whose_tokens_changed(bench: Bench, more: list[str]) -> None:
    lines = bench.data.read_text().splitlines()
    lines[4] = lines[4].replace("count", "Count")
    bench.data.write_text("\n".join(lines))
    line = bench.refused("train", *more)
    assert (
        "data.jsonl:5: this sample is not in store (its tokens changed, or it was not collected); collect again" in line
    )


def test_a_store_that_is_missing_or_unfinished(bench: Bench) -> None:
    assert "nowhere: no candidate store here (no manifest.json); check the path, or run collect" in bench.refused(
        "train", "train.store=nowhere"
    )
    (bench.store / "manifest.json").unlink()
    for verb in (["train"], ["store", "stats", "store"], ["store", "export", "store", "--output", "rows.jsonl"]):
        assert (
            "store: this store is unfinished; run collect again with the same settings to finish it"
            in bench.refused(*verb)
        )


def test_a_damaged_store(bench: Bench) -> None:
    flip(bench.segment(), 200)
    name = bench.segment().relative_to(bench.folder)
    says = (
        f"{name}: byte 64: the block (3648 bytes) does not match its checksum; run `store repair` and then collect "
        "again"
    )
    assert says in bench.refused("store", "export", "store", "--output", "rows.jsonl")
    before = snapshot(bench.store)
    for more in ([], ["--ranks", "2"]):  # found before the first step
        assert says in bench.refused("train", *more)
    assert snapshot(bench.store) == before
    flip(bench.segment(), -10)
    assert "the segment has no valid seal" in bench.refused("train")
    flip(bench.store / "manifest.json", 30)
    line = bench.refused("store", "inspect", "store")
    assert "store/manifest.json: byte 0: the text does not match its checksum (changed by hand, or damaged)" in line


@pytest.mark.parametrize("more", [[], ["--ranks", "2"]], ids=["1 rank", "2 ranks"])
def test_collecting_into_a_store_begun_otherwise(bench: Bench, more: list[str]) -> None:
    line = bench.refused("collect", "collect.store=store", "collect.tau=0.5", *more, out=True)
    assert (
        "store: begun with tau 0.95, but this run has tau 0.5; use the same setting, or collect into another folder"
        in line
    )
    write_lines(bench.data, [{"prompt": "a", "completion": "b"}])
    assert "store: begun with dataset " in bench.refused("collect", "collect.store=store", *more, out=True)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["store", "verify", "nowhere"], "nowhere: no candidate store here"),
        (
            ["store", "repair", "nowhere"],
            "nowhere/manifest.json: cannot read: No such file or directory; check the path",
        ),
        (["store", "export", "store"], "export needs --output FILE.jsonl or FILE.parquet"),
        (
            ["store", "export", "store", "--output", "rows.csv"],
            "rows.csv: export writes .jsonl or .parquet; name the file so",
        ),
        (
            ["store", "export", "store", "--output", "no/rows.jsonl"],
            "no/rows.jsonl: cannot write: No such file or directory; check",
        ),
        (["store", "compare", "store"], "compare takes two stores, got 1"),
        (["store", "mend", "store"], "unknown action 'mend'; one of inspect"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_store_verb(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused(*argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["collect", "collect.store=afile"],
            "afile: cannot create the store: Not a directory; a file stands where a folder should be",
        ),
        (["collect", "collect.store=afile/s", "--ranks", "2"], "afile/s: cannot create the store: Not a directory"),
        (["train", "train.save=afile"], "train.save=afile: "),
        (
            ["train", "train.save=afile/deep/er", "--ranks", "2"],
            "afile is a file, so there can be no folder; choose another place",
        ),
        (["train", "output=afile"], "output=afile: "),
        (["convert", "model", "afile/x"], "afile is a file, so there can be no folder; choose another place"),
        (["evaluate", "evaluate.targets=data.jsonl", "evaluate.output=afile/x.json"], "evaluate.output"),
        (
            ["evaluate", "evaluate.targets=data.jsonl", "evaluate.output=store"],
            "evaluate.output=store: this is a folder; name a file",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_file_where_a_folder_should_be(bench: Bench, argv: list[str], says: str) -> None:
    """Told before the first step: a run that cannot save must not begin."""
    (bench.folder / "afile").write_text("mine")
    line = bench.refused(*argv, out=argv[0] == "collect")
    assert says in line and ("choose another" in line or "name a file" in line)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(bench: Bench) -> None:
    locked = bench.folder / "locked"
    locked.mkdir(mode=0o500)
    for argv in (["collect", "collect.store=locked/s"], ["train", "train.save=locked"], ["train", "output=locked/x"]):
        assert "locked" in bench.refused(*argv, out=True)


@pytest.fixture
def checkpoint(bench: Bench) -> Path:
    """Made of the model by convert."""
    done = bench.served("convert", "model", "checkpoint", cwd=bench.folder)
    assert done.code == 0, done.err
    return bench.folder / "checkpoint"


def test_a_checkpoint_that_is_missing_or_of_no_training(bench: Bench, checkpoint: Path) -> None:
    assert "nowhere: no such folder; give a checkpoint folder" in bench.refused("train", "train.load=nowhere")
    line = bench.refused("train", "train.load=checkpoint")
    assert "holds a model without optimizer state (made by convert); give it as model=, not as train.load=" in line
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("7")
    assert "iter_0000007" in bench.refused("train", "model=checkpoint")


def test_a_torn_checkpoint(bench: Bench, checkpoint: Path) -> None:
    file = checkpoint / "iter_0000000" / "__0_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-3000])
    for verb in (["generate", "model=checkpoint", "hello"], ["convert", "checkpoint", "back"]):
        line = bench.refused(*verb)
        assert (
            "__0_0.distcp" in line
            and "damaged" in line
            and line.endswith("; use another checkpoint")
            and len(line) < 400
        )
    file.unlink()
    assert "__0_0.distcp" in bench.refused("generate", "model=checkpoint", "hello")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_checkpoint_never_runs_code(bench: Bench, checkpoint: Path, name: str) -> None:
    file = checkpoint / "iter_0000000" / name
    if name == ".metadata":
        file.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save([Evil()], file)  # over the first object of the .distcp file too
    for verb in (
        ["generate", "model=checkpoint", "hello"],
        ["train", "train.load=checkpoint"],
        ["convert", "checkpoint", "back"],
    ):
        line = bench.refused(*verb)
        assert name in line and line.endswith(("do not use this checkpoint", "use another checkpoint"))
        assert name == "__0_0.distcp" or "loading it would run code: it names posix.system" in line
    line = bench.refused("generate", "model=checkpoint", "hello", "--ranks", "2")
    assert name in line


FULL = (
    "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); from megatron_replay.cli import "
    "main; sys.exit(main())"
)
"""A process for which every disk is full after so many bytes of a file."""


def full_disk(bench: Bench, size: int, verb: str, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FULL.format(size), *bench.command(verb, *argv)],
        cwd=bench.folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_there(bench: Bench) -> None:
    """A checkpoint that cannot be written leaves the one before it the latest.

    Resuming from that ends where an undisturbed run does.
    """
    done = bench.served(*bench.command("train", "train.save=saved", "train.iters=1"), cwd=bench.folder)
    assert done.code == 0, done.err
    before = snapshot(bench.folder / "saved")
    line = full_disk(bench, 20_000, "train", "train.save=saved", "train.load=saved", "train.iters=2")
    assert (
        "saved/iter_0000002: cannot be written" in line
        and "make room and resume, earlier checkpoints are intact" in line
    )
    after = snapshot(bench.folder / "saved")
    assert {name: content for name, content in after.items() if "iter_0000002" not in name} == before
    done = bench.served(
        *bench.command("train", "train.save=saved", "train.load=saved", "train.iters=2"), cwd=bench.folder
    )
    assert done.code == 0 and "resumed from saved at iteration 1" in done.out, done.err


def test_a_full_disk_of_the_other_verbs(bench: Bench) -> None:
    before = snapshot(bench.folder)
    assert "new: File too large" in full_disk(bench, 20_000, "convert", "model", "new")
    assert snapshot(bench.folder) == before
