"""Whatever a user can get wrong: one line that names the thing, the value and the way out; exit code 2; nothing written, nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import ROOT, Served
from tinymodel import QWEN3, SETTINGS, Tiny, write_lines, write_model, write_tokenizer

GOOD = {"prompt": "a", "completion": "b"}


class Evil:
    """A pickle that makes a file where the command runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


@dataclass
class Bench:
    """A folder to spoil things in, and what is in it: copies of the tiny model, data and store."""

    folder: Path
    served: Served
    tiny: Tiny
    model: Path = field(init=False)
    data: Path = field(init=False)
    store: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = Path(shutil.copytree(self.tiny.model, self.folder / "model"))
        self.store = Path(shutil.copytree(self.tiny.store, self.folder / "store"))
        self.data = Path(shutil.copy(self.tiny.data, self.folder / "data.jsonl"))

    def refused(self, verb: str, *argv: str, out: bool = False) -> str:
        """Run what must be refused; returns its one line. Nothing in the folder may change, and (without `out`) nothing be printed."""
        before = snapshot(self.folder)
        done = self.served(*self.command(verb, *argv), cwd=self.folder)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err.startswith("megatron-replay") and "Traceback" not in done.err
        assert out or done.out == ""
        assert snapshot(self.folder) == before
        return done.err.strip()

    def command(self, verb: str, *argv: str) -> list[str]:
        given = {
            "collect": ("model=model", "data.path=data.jsonl", "collect.store=new", *SETTINGS),
            "train": ("model=model", "data.path=data.jsonl", "train.store=store", "output=out", *SETTINGS),
            "evaluate": ("model=model", *SETTINGS),
            "generate": ("model=model", *SETTINGS),
        }.get(verb, ())
        return [verb, *given, *argv]

    def config(self, **changes: Any) -> None:
        """Change keys of the model's config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = self.model / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    def segment(self) -> Path:
        return next((self.store / "segments").glob("*.mrs"))


@pytest.fixture
def bench(tmp_path: Path, served: Served, tiny: Tiny) -> Bench:
    return Bench(tmp_path, served, tiny)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", \n', ["data.jsonl:3: broken JSON at column", "fix or remove the line"]),
        (b"", ["data.jsonl: empty; expected at least one record"]),
        (b"[1]\n", ["data.jsonl:1: expected a JSON object with keys, found a list; write one record per line"]),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', ["data.jsonl:1: messages[0]: unknown role 'robot'", "known: system, user"]),
        (b'{"prompt": "\xff", "completion": "b"}', ["data.jsonl:1: byte 13 of the line is not UTF-8 (0xff); convert the file to UTF-8"]),
        (b'{"question": "a"}', ["data.jsonl:1: the keys 'question' fit no format; expected one of messages"]),
        (b'{"prompt": "a", "completion": ""}', ["data.jsonl:1: 'completion' is empty", "remove the record"]),
        (b'{"prompt": "a", "completion": "\\ud800"}', ["data.jsonl:1: ", "half of a surrogate pair (U+D800); fix the text"]),
    ],
    ids=["broken json", "empty", "array", "unknown role", "utf-8", "unknown keys", "nothing to train on", "no Unicode"],
)
def test_data(bench: Bench, content: bytes, says: list[str]) -> None:
    bench.data.write_bytes(content)
    line = bench.refused("collect")
    assert all(part in line for part in says), line


def test_data_that_is_missing_or_too_long(bench: Bench) -> None:
    assert "nowhere.jsonl: no such file; give a .jsonl or .txt file" in bench.refused("collect", "data.path=nowhere.jsonl")
    line = bench.refused("train", "data.seq_length=16")
    assert "data.jsonl:1: 24 tokens, but data.seq_length is 16; raise it, or set data.over_length=drop or truncate" in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["collet"], "unknown verb 'collet'; did you mean 'collect'?"),
        (["collect", "data.seq_lenght=16"], "data.seq_lenght: unknown key; did you mean 'seq_length'?"),
        (["collect", "data.seq_length=long"], "data.seq_length: expected int, got 'long'"),
        (["collect", "data.seq_length=-1"], "data.seq_length must be above 0, got -1"),
        (["collect", "collect.tau=1.5"], "collect.tau is a probability mass in (0, 1], got 1.5"),
        (["collect", "collect.strategy=buckets"], "'buckets' is not one of all, random, last, bucket; did you mean 'bucket'?"),
        (["collect", "collect.store="], "collect.store is not set; give the folder"),
        (["collect", "model="], "model is not set; give a Hugging Face folder or a checkpoint folder: model=PATH"),
        (["train", "optimizer.max_angel=3"], "optimizer 'moclip' has no option 'max_angel'; did you mean 'max_angle'?"),
        (["train", "optimizer.max_angel=3", "--ranks", "2"], "optimizer 'moclip' has no option 'max_angel'; did you mean 'max_angle'?"),
        (["train", "optimizer.max_angle=wide"], "max_angle must be a finite number, got 'wide'"),
        (["train", "optimizer.name=moclp"], "unknown optimizer 'moclp'; did you mean 'moclip'?"),
        (["train", "train.store="], "train.loss=restricted needs the candidate store of `collect`: train.store=PATH"),
        (["train", "data.template=none.jinja"], "data.template=none.jinja: cannot be read (No such file or directory); give auto, plain"),
        (["generate"], "no prompt; write it after the verb in quotes"),
        (["evaluate"], "nothing to evaluate; set one of evaluate.text"),
        (["convert", "model", "data.jsonl"], "data.jsonl exists and is not an empty folder; choose another target or remove it"),
        (["convert", "nowhere", "new"], "nowhere: no such folder; a model is a Hugging Face folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_configuration(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused(*argv)


def test_yaml_makes_no_objects(bench: Bench) -> None:
    (bench.folder / "run.yaml").write_text('seed: 1\ndata: !!python/object/apply:os.system ["touch owned"]\n')
    line = bench.refused("collect", "run.yaml")
    assert "run.yaml, line 2: not valid YAML: could not determine a constructor" in line and "write plain 'key: value' lines" in line
    assert "cannot be read" in bench.refused("train", 'data.template=!!python/object/apply:os.system ["touch owned"]')


@pytest.mark.parametrize("verb", ["collect", "generate", "evaluate"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_absent(bench: Bench, verb: str) -> None:
    more = {"generate": ["hello"], "evaluate": ["evaluate.targets=data.jsonl"]}.get(verb, [])
    assert "device=cuda is not available here; this machine has: cpu" in bench.refused(verb, *more, "device=cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_absent_is_told_before_ranks_start(bench: Bench) -> None:
    assert "device=cuda is not available here" in bench.refused("train", "device=cuda", "--ranks", "2")


def missing_tensor(bench: Bench) -> None:
    bench.tensors(lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))


def misshapen_tensor(bench: Bench) -> None:
    bench.tensors(lambda held: held.update({"model.norm.weight": torch.ones(31)}))


def truncated(bench: Bench) -> None:
    path = bench.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(bench: Bench) -> None:
    (bench.model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, bench.model / "pytorch_model.bin")


BOTH = "config.json and weights must be of one model"
MODELS: dict[str, tuple[Callable[[Bench], Any], list[str]]] = {
    "architecture": (
        lambda b: b.config(architectures=["MixtralForCausalLM"]),
        ["config.json: unknown architecture 'MixtralForCausalLM'; known: LlamaForCausalLM, Qwen3ForCausalLM"],
    ),
    "misspelt": (lambda b: b.config(architectures=["Qwen3ForCasualLM"]), ["'Qwen3ForCasualLM'; did you mean 'Qwen3ForCausalLM'?"]),
    "no config": (lambda b: (b.model / "config.json").unlink(), ["model: no config.json in it; a model is a Hugging Face folder"]),
    "missing tensor": (missing_tensor, ["model: tensor 'model.layers.1.mlp.up_proj.weight' [64, 32] is missing", BOTH]),
    "misshapen tensor": (misshapen_tensor, ["model: tensor 'model.norm.weight' is [31], expected [32] by config.json", BOTH]),
    "truncated": (truncated, ["model/model.safetensors: truncated or corrupt safetensors file", "download or write it again"]),
    "no weights": (lambda b: (b.model / "model.safetensors").unlink(), ["model: no weights: neither model.safetensors nor"]),
    "pickled weights": (pickled, ["only pytorch_model.bin weights, which are not read (they can run code); convert them to safetensors"]),
    "tokenizer too large": (
        lambda b: write_tokenizer(b.model, *(f"<{i}>" for i in range(20))),
        ["model: the tokenizer knows 277 ids, the model has 264 rows; use the model's own tokenizer"],
    ),
    "tokenizer torn": (
        lambda b: (b.model / "tokenizer.json").write_text("{"),
        ["tokenizer.json: not a tokenizer.json", "copy the file again"],
    ),
    "no tokenizer": (lambda b: (b.model / "tokenizer.json").unlink(), ["model: no tokenizer.json, tokenizer.model or *.tiktoken; copy"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_model(bench: Bench, name: str) -> None:
    spoil, says = MODELS[name]
    spoil(bench)
    line = bench.refused("collect")
    assert all(part in line for part in says), line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["layout.tensor=4", "--ranks", "4"], "2 key/value heads are not divisible by layout.tensor=4; set layout.head_multiple=4"),
        (["layout.pipeline=3"], "2 layers cannot fill layout.pipeline=3 stages; use layout.pipeline=1 to 2"),
        (["layout.pipeline=2", "layout.split=[1,2]"], "layout.split=[1, 2] must give every stage a layer and add up to 2 layers"),
        (
            ["batch.total=3", "--ranks", "2"],
            "batch.total=3 rows cannot be dealt to 2 data-parallel replicas in micro-batches of 1",
        ),
        (["layout.tensor=2", "--ranks", "3"], "layout.tensor=2 x layout.pipeline=1 needs a multiple of 2 ranks, 3 were started"),
        (["layout.tensor=2"], "needs a multiple of 2 ranks, 1 were started; start with --ranks 2 or change the layout"),
        (["batch.micro=3"], "batch.total (4) must be a multiple of batch.micro (3)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_layout(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused("train", *argv)


def test_store_of_another_model(bench: Bench) -> None:
    write_model(bench.folder / "other", QWEN3, seed=7)
    for more in ([], ["--ranks", "2"]):
        line = bench.refused("train", "model=other", *more)
        assert "store: collected with base model " in line and "but this run has " in line and "use the same, or collect again" in line


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
    assert "data.jsonl:5: this sample is not in store (its tokens changed, or it was not collected); collect again" in line


def test_a_store_that_is_missing_or_unfinished(bench: Bench) -> None:
    assert "nowhere: no candidate store here (no manifest.json); check the path, or run collect" in bench.refused(
        "train", "train.store=nowhere"
    )
    (bench.store / "manifest.json").unlink()
    for verb in (["train"], ["store", "stats", "store"], ["store", "export", "store", "--output", "rows.jsonl"]):
        assert "store: this store is unfinished; run collect again with the same settings to finish it" in bench.refused(*verb)


def test_a_damaged_store(bench: Bench) -> None:
    flip(bench.segment(), 200)
    name = bench.segment().relative_to(bench.folder)
    says = f"{name}: byte 64: the block (3648 bytes) does not match its checksum; run `store repair` and then collect again"
    assert says in bench.refused("store", "export", "store", "--output", "rows.jsonl")
    before = snapshot(bench.store)
    for more in ([], ["--ranks", "2"]):  # found when the block is first read, so the run's log is there already
        done = bench.served(*bench.command("train", *more), cwd=bench.folder)
        assert done.code == 2 and says in done.err and done.err.count("\n") == 1
    assert snapshot(bench.store) == before
    flip(bench.segment(), -10)
    assert "the segment has no valid seal" in bench.refused("train")
    flip(bench.store / "manifest.json", 30)
    line = bench.refused("store", "inspect", "store")
    assert "store/manifest.json: byte 0: the text does not match its checksum (changed by hand, or damaged)" in line


@pytest.mark.parametrize("more", [[], ["--ranks", "2"]], ids=["1 rank", "2 ranks"])
def test_collecting_into_a_store_begun_otherwise(bench: Bench, more: list[str]) -> None:
    line = bench.refused("collect", "collect.store=store", "collect.tau=0.5", *more, out=True)
    assert "store: begun with tau 0.95, but this run has tau 0.5; use the same setting, or collect into another folder" in line
    write_lines(bench.data, [GOOD])
    assert "store: begun with dataset " in bench.refused("collect", "collect.store=store", *more, out=True)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["store", "verify", "nowhere"], "nowhere: no candidate store here"),
        (["store", "repair", "nowhere"], "nowhere/manifest.json: cannot read: No such file or directory; check the path"),
        (["store", "export", "store"], "export needs --output FILE.jsonl or FILE.parquet"),
        (["store", "export", "store", "--output", "rows.csv"], "rows.csv: export writes .jsonl or .parquet; name the file so"),
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
        (["collect", "collect.store=afile"], "afile: cannot create the store: Not a directory; a file stands where a folder should be"),
        (["collect", "collect.store=afile/s", "--ranks", "2"], "afile/s: cannot create the store: Not a directory"),
        (["train", "train.save=afile"], "train.save=afile: "),
        (["train", "train.save=afile/deep/er", "--ranks", "2"], "afile is a file, so there can be no folder; choose another place"),
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


def question(**changes: Any) -> dict[str, Any]:
    return {"prompt": "how many?", "query": "select 1", "db_id": "one", **changes}


EVALUATIONS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "choice without keys": ("choice", [{"question": "q"}], "asked.jsonl:1: a multiple-choice line is {question, choices, answer}"),
    "choice beyond": (
        "choice",
        [{"question": "q", "choices": ["a", "b"], "answer": 2}],
        "asked.jsonl:1: answer 2 is not the index of one of the 2 choices",
    ),
    "no choice": ("choice", [], "asked.jsonl: empty; expected lines of {question, choices, answer}"),
    "no text": ("text", [], "asked.jsonl: perplexity needs at least 2 tokens in the text and in a window, got 0"),
    "no targets": ("targets", [], "asked.jsonl: empty; expected at least one record"),
    "no db_id": ("nl2sql", [question(db_id=None)], "asked.jsonl:1: an nl2sql line needs the keys db_id and query"),
    "no database": (
        "nl2sql",
        [question(), question(db_id="two")],
        "asked.jsonl:2: no database databases/two.sqlite; evaluate.databases",
    ),
    "a database elsewhere": ("nl2sql", [question(db_id="../one")], "asked.jsonl:1: db_id '../one' is no plain name"),
    "not a database": (
        "nl2sql",
        [question(db_id="torn")],
        "asked.jsonl:1: databases/torn.sqlite is no SQLite database; copy",
    ),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluate(bench: Bench, name: str) -> None:
    key, records, says = EVALUATIONS[name]
    write_lines(bench.folder / "asked.jsonl", records)
    (bench.folder / "databases").mkdir()
    (bench.folder / "databases" / "one.sqlite").touch()
    (bench.folder / "databases" / "torn.sqlite").write_text("torn")
    more = ["evaluate.databases=databases"] if key == "nl2sql" else []
    assert says in bench.refused("evaluate", f"evaluate.{key}=asked.jsonl", *more)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["evaluate.text=nowhere.txt"], "evaluate.text=nowhere.txt: no such file or folder"),
        (["evaluate.base=nowhere"], "evaluate.base=nowhere: no such file or folder"),
        (["evaluate.nl2sql=data.jsonl"], "evaluate.databases='': not a folder; nl2sql needs the folder of <db_id>.sqlite files"),
        (["evaluate.nl2sql=data.jsonl", "evaluate.databases=nowhere"], "evaluate.databases='nowhere': not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_without_its_files(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused("evaluate", *argv)


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
        assert "__0_0.distcp" in line and "damaged" in line and line.endswith("; use another checkpoint") and len(line) < 400
    file.unlink()
    assert "__0_0.distcp" in bench.refused("generate", "model=checkpoint", "hello")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_checkpoint_never_runs_code(bench: Bench, checkpoint: Path, name: str) -> None:
    file = checkpoint / "iter_0000000" / name
    if name == ".metadata":
        file.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save([Evil()], file)  # over the first object of the .distcp file too
    for verb in (["generate", "model=checkpoint", "hello"], ["train", "train.load=checkpoint"], ["convert", "checkpoint", "back"]):
        line = bench.refused(*verb)
        assert name in line and line.endswith(("do not use this checkpoint", "use another checkpoint"))
        assert name == "__0_0.distcp" or "loading it would run code: it names posix.system" in line
    line = bench.refused("generate", "model=checkpoint", "hello", "--ranks", "2")
    assert name in line


FULL = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); from megatron_replay.cli import main; sys.exit(main())"
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


def test_a_full_disk_keeps_what_is_there(bench: Bench) -> None:
    """A checkpoint that cannot be written leaves the one before it the latest; resuming from that ends where an undisturbed run does."""
    done = bench.served(*bench.command("train", "train.save=saved", "train.iters=1"), cwd=bench.folder)
    assert done.code == 0, done.err
    before = snapshot(bench.folder / "saved")
    line = full_disk(bench, 20_000, "train", "train.save=saved", "train.load=saved", "train.iters=2")
    assert "saved/iter_0000002: cannot be written" in line and "make room and resume, earlier checkpoints are intact" in line
    after = snapshot(bench.folder / "saved")
    assert {name: content for name, content in after.items() if "iter_0000002" not in name} == before
    done = bench.served(*bench.command("train", "train.save=saved", "train.load=saved", "train.iters=2"), cwd=bench.folder)
    assert done.code == 0 and "resumed from saved at iteration 1" in done.out, done.err


def test_a_full_disk_of_the_other_verbs(bench: Bench) -> None:
    before = snapshot(bench.folder)
    assert "new: File too large" in full_disk(bench, 20_000, "convert", "model", "new")
    assert snapshot(bench.folder) == before


def test_the_installed_program_says_it_once() -> None:
    """The same through a process of its own, once with ranks: neither warnings nor a second rank add a line."""
    for argv, says in [
        (["train", "model=nowhere", "train.loss=full", "device=cpu"], "nowhere: no such folder"),
        (["collect", "model=nowhere", "collect.store=s", "device=cpu", "--ranks", "2"], "nowhere: no such folder"),
    ]:
        done = subprocess.run([sys.executable, "-m", "megatron_replay", *argv], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
