"""Data, configuration, models and layouts that cannot be used: one line that names the thing, the value and the way
out; exit code 2."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench import Bench, Evil
from served import ROOT
from tinymodel import write_lines, write_tokenizer


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b'{"prompt": "a", "completion": "b"}\n\n{"prompt": "a", \n',
            ["data.jsonl:3: broken JSON at column", "fix or remove the line"],
        ),
        (b"", ["data.jsonl: empty; expected at least one record"]),
        (b"[1]\n", ["data.jsonl:1: expected a JSON object with keys, found a list; write one record per line"]),
        (
            b'{"messages": [{"role": "robot", "content": "x"}]}',
            ["data.jsonl:1: messages[0]: unknown role 'robot'", "known: system, user"],
        ),
        (
            b'{"prompt": "\xff", "completion": "b"}',
            ["data.jsonl:1: byte 13 of the line is not UTF-8 (0xff); convert the file to UTF-8"],
        ),
        (b'{"question": "a"}', ["data.jsonl:1: the keys 'question' fit no format; expected one of messages"]),
        (b'{"prompt": "a", "completion": ""}', ["data.jsonl:1: 'completion' is empty", "remove the record"]),
        (
            b'{"prompt": "a", "completion": "\\ud800"}',
            ["data.jsonl:1: ", "half of a surrogate pair (U+D800); fix the text"],
        ),
    ],
    ids=["broken json", "empty", "array", "unknown role", "utf-8", "unknown keys", "nothing to train on", "no Unicode"],
)
def test_data(bench: Bench, content: bytes, says: list[str]) -> None:
    bench.data.write_bytes(content)
    line = bench.refused("collect")
    assert all(part in line for part in says), line


def test_data_that_is_missing_or_too_long(bench: Bench) -> None:
    assert "nowhere.jsonl: no such file; give a .jsonl or .txt file" in bench.refused(
        "collect", "data.path=nowhere.jsonl"
    )
    line = bench.refused("train", "data.seq_length=16")
    assert (
        "data.jsonl:1: 24 tokens, but data.seq_length is 16; raise it, or set data.over_length=drop or truncate" in line
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["collet"], "unknown verb 'collet'; did you mean 'collect'?"),
        (["collect", "data.seq_lenght=16"], "data.seq_lenght: unknown key; did you mean 'seq_length'?"),
        (["collect", "data.seq_length=long"], "data.seq_length: expected int, got 'long'"),
        (["collect", "data.seq_length=-1"], "data.seq_length must be above 0, got -1"),
        (["collect", "collect.tau=1.5"], "collect.tau is a probability mass in (0, 1], got 1.5"),
        (
            ["collect", "collect.strategy=buckets"],
            "'buckets' is not one of all, random, last, bucket; did you mean 'bucket'?",
        ),
        (["collect", "collect.store="], "collect.store is not set; give the folder"),
        (["collect", "model="], "model is not set; give a Hugging Face folder or a checkpoint folder: model=PATH"),
        (["train", "optimizer.max_angel=3"], "optimizer 'moclip' has no option 'max_angel'; did you mean 'max_angle'?"),
        (
            ["train", "optimizer.max_angel=3", "--ranks", "2"],
            "optimizer 'moclip' has no option 'max_angel'; did you mean 'max_angle'?",
        ),
        (["train", "optimizer.max_angle=wide"], "max_angle must be a finite number, got 'wide'"),
        (
            ["train", "optimizer.name=mofo", "optimizer.fractoin=0.3"],
            "optimizer 'mofo' has no option 'fractoin'; did you mean 'fraction'?",
        ),
        (["train", "optimizer.name=mofo", "optimizer.fraction=2"], "fraction must be a share in (0, 1], got 2"),
        (["train", "optimizer.name=tam", "optimizer.variant=adam"], "variant 'adam' is not one of adatamw, paper"),
        (["train", "optimizer.name=muon", "optimizer.momentum=1"], "momentum must be below 1, got 1"),
        (["train", "optimizer.pull=-1"], "pull must be at least 0, got -1"),
        (
            ["train", "optimizer.shards=3"],
            "optimizer.shards is given by the trainer, not by a configuration; remove it",
        ),
        (["train", "train.loss=full", "schedule.warmup_iters=50"], "warm-up must be shorter than the run, got 50 of"),
        (["train", "optimizer.name=moclp"], "unknown optimizer 'moclp'; did you mean 'moclip'?"),
        (["train", "train.store="], "train.loss=restricted needs the candidate store of `collect`: train.store=PATH"),
        (["train", "train.loss=fulll"], "unknown train.loss 'fulll'; did you mean 'full'?"),
        (["train", "train.loss=mse"], "unknown train.loss 'mse'; known: "),
        (
            ["train", "data.template=none.jinja"],
            "data.template=none.jinja: cannot be read (No such file or directory); give auto, plain",
        ),
        (["generate"], "no prompt; write it after the verb in quotes"),
        (["evaluate"], "nothing to evaluate; set one of evaluate.text"),
        (
            ["convert", "model", "data.jsonl"],
            "data.jsonl exists and is not an empty folder; choose another target or remove it",
        ),
        (["convert", "nowhere", "new"], "nowhere: no such folder; a model is a Hugging Face folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_configuration(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused(*argv)


def test_yaml_makes_no_objects(bench: Bench) -> None:
    (bench.folder / "run.yaml").write_text('seed: 1\ndata: !!python/object/apply:os.system ["touch owned"]\n')
    line = bench.refused("collect", "run.yaml")
    assert (
        "run.yaml, line 2: not valid YAML: could not determine a constructor" in line
        and "write plain 'key: value' lines" in line
    )
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
    "misspelt": (
        lambda b: b.config(architectures=["Qwen3ForCasualLM"]),
        ["'Qwen3ForCasualLM'; did you mean 'Qwen3ForCausalLM'?"],
    ),
    "no config": (
        lambda b: (b.model / "config.json").unlink(),
        ["model: no config.json in it; a model is a Hugging Face folder"],
    ),
    "missing tensor": (missing_tensor, ["model: tensor 'model.layers.1.mlp.up_proj.weight' [64, 32] is missing", BOTH]),
    "misshapen tensor": (
        misshapen_tensor,
        ["model: tensor 'model.norm.weight' is [31], expected [32] by config.json", BOTH],
    ),
    "truncated": (
        truncated,
        ["model/model.safetensors: truncated or corrupt safetensors file", "download or write it again"],
    ),
    "no weights": (
        lambda b: (b.model / "model.safetensors").unlink(),
        ["model: no weights: neither model.safetensors nor"],
    ),
    "pickled weights": (
        pickled,
        ["only pytorch_model.bin weights, which are not read (they can run code); convert them to safetensors"],
    ),
    "tokenizer too large": (
        lambda b: write_tokenizer(b.model, *(f"<{i}>" for i in range(20))),
        ["model: the tokenizer knows 277 ids, the model has 264 rows; use the model's own tokenizer"],
    ),
    "tokenizer torn": (
        lambda b: (b.model / "tokenizer.json").write_text("{"),
        ["tokenizer.json: not a tokenizer.json", "copy the file again"],
    ),
    "no tokenizer": (
        lambda b: (b.model / "tokenizer.json").unlink(),
        ["model: no tokenizer.json, tokenizer.model or *.tiktoken; copy"],
    ),
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
        (
            ["layout.tensor=4", "--ranks", "4"],
            "2 key/value heads are not divisible by layout.tensor=4; set layout.head_multiple=4",
        ),
        (["layout.pipeline=3"], "2 layers cannot fill layout.pipeline=3 stages; use layout.pipeline=1 to 2"),
        (
            ["layout.pipeline=2", "layout.split=[1,2]"],
            "layout.split=[1, 2] must give every stage a layer and add up to 2 layers",
        ),
        (
            ["batch.total=3", "--ranks", "2"],
            "batch.total=3 rows cannot be dealt to 2 data-parallel replicas in micro-batches of 1",
        ),
        (
            ["layout.tensor=2", "--ranks", "3"],
            "layout.tensor=2 x layout.pipeline=1 needs a multiple of 2 ranks, 3 were started",
        ),
        (["layout.tensor=2"], "needs a multiple of 2 ranks, 1 were started; start with --ranks 2 or change the layout"),
        (["batch.micro=3"], "batch.total (4) must be a multiple of batch.micro (3)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_layout(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused("train", *argv)


def question(**changes: Any) -> dict[str, Any]:
    return {"prompt": "how many?", "query": "select 1", "db_id": "one", **changes}


EVALUATIONS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "choice without keys": (
        "choice",
        [{"question": "q"}],
        "asked.jsonl:1: a multiple-choice question is {question, choices, answer}",
    ),
    "choice beyond": (
        "choice",
        [{"question": "q", "choices": ["a", "b"], "answer": 2}],
        "asked.jsonl:1: answer 2 is not the index of one of the 2 choices",
    ),
    "no choice": ("choice", [], "asked.jsonl: empty; expected at least one question"),
    "no task": (
        "generation",
        [{"question": "q"}],
        "asked.jsonl:1: a question to generate for has the keys question and answer",
    ),
    "no gold number": (
        "generation",
        [{"question": "q", "answer": "5"}],
        "asked.jsonl:1: the answer has no '#### number' at its end",
    ),
    "two tasks": (
        "generation",
        [{"question": "q", "answer": "#### 5"}, {"input": "q", "target": "a"}],
        "asked.jsonl: questions of bbh and gsm8k",
    ),
    "conversations as text": ("text", [{"prompt": "p", "completion": "c"}], "evaluate.text reads lines of {text}"),
    "no text": ("text", [], "asked.jsonl: empty; expected at least one record"),
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
    "no gold query that runs": (
        "nl2sql",
        [question(query="select a from t")],
        "asked.jsonl: no gold query runs within evaluate.sql_seconds=5 and evaluate.sql_rows=10000; the first fails "
        "with: no such table: t",
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
        (
            ["evaluate.nl2sql=data.jsonl"],
            "evaluate.databases='': not a folder; nl2sql needs the folder of <db_id>.sqlite files",
        ),
        (["evaluate.nl2sql=data.jsonl", "evaluate.databases=nowhere"], "evaluate.databases='nowhere': not a folder"),
        (["evaluate.sql_rule=brid"], "evaluate.sql_rule: 'brid' is not one of spider, bird, strict"),
        (["evaluate.sql_seconds=0"], "evaluate.sql_seconds must be above 0, got 0"),
        (["evaluate.sql_seconds=.inf"], "evaluate.sql_seconds is the time limit of a query, got inf; give a number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_without_its_files(bench: Bench, argv: list[str], says: str) -> None:
    assert says in bench.refused("evaluate", *argv)


def test_the_installed_program_says_it_once() -> None:
    """The same through a process of its own, once with ranks: neither warnings nor a second rank add a line."""
    for argv, says in [
        (["train", "model=nowhere", "train.loss=full", "device=cpu"], "nowhere: no such folder"),
        (["collect", "model=nowhere", "collect.store=s", "device=cpu", "--ranks", "2"], "nowhere: no such folder"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_replay", *argv], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and says in done.stderr, (
            done.stderr
        )
