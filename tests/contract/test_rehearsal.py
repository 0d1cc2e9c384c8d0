"""Rehearsal from the command line: the base model writes texts, and training holds itself to what was stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import Bench, snapshot
from served import Done, Served
from tinymodel import SETTINGS, Tiny, write_lines

from megatron_replay.data.texts import load_texts

TWO = ["--ranks", "2"]
LAYOUTS = {"data": TWO, "tensor": [*TWO, "layout.tensor=2"], "pipeline": [*TWO, "layout.pipeline=2"]}
TEXTS = ["rehearsal.samples=10", "rehearsal.max_new_tokens=12", "rehearsal.batch=4", "rehearsal.k_max=16"]
REHEARSE = ["rehearsal.path=texts", "rehearsal.share=0.5", *TEXTS]
CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ':' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant:' }}{% endif %}"
)

Run = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module")
def run(served: Served, tiny: Tiny, folder: Path) -> Run:
    def go(verb: str, *argv: str, code: int = 0) -> Done:
        done = served(verb, f"model={tiny.model}", f"data.path={tiny.data}", *SETTINGS, *argv, cwd=folder)
        assert done.code == code, done.out + done.err
        return done

    return go


@pytest.fixture(scope="module")
def texts(run: Run, folder: Path) -> Path:
    """Texts, their sets, and sets of the prompts of the data."""
    run("collect", *REHEARSE, "rehearsal.prompts=1", "rehearsal.fraction=1")
    return folder / "texts"


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_the_texts_are_the_models_own(texts: Path) -> None:
    samples = load_texts(texts)
    assert len(samples) == 10 and len({sample.ids.tobytes() for sample in samples}) == 10
    for sample in samples:  # from nothing: behind the end token, as this tokenizer has no bos
        assert sample.ids[0] == 256 and 2 <= len(sample) <= 13 and sample.mask[1:].all() and not sample.mask[0]
        assert (sample.ids < 257).all()
    about, *lines = (texts / "texts.jsonl").read_text().splitlines()
    assert json.loads(about)["source"] == ["free"] and json.loads(about)["temperature"] == 1.0
    assert all({"number", "ids", "written", "text"} == json.loads(line).keys() for line in lines)
    assert json.loads((texts / "store" / "manifest.json").read_text())["logits"] == "fp16"


@pytest.mark.matrix(1)
@pytest.mark.parametrize("ranks", LAYOUTS.values(), ids=LAYOUTS)
def test_other_ranks_write_the_same_texts(run: Run, texts: Path, folder: Path, ranks: list[str]) -> None:
    name = f"texts-{'-'.join(ranks).strip('-')}"
    run("collect", *REHEARSE, f"rehearsal.path={name}", *ranks)
    assert (folder / name / "texts.jsonl").read_bytes() == (texts / "texts.jsonl").read_bytes()


def test_a_run_that_was_stopped_goes_on_with_the_same_texts(run: Run, texts: Path, folder: Path) -> None:
    begun = folder / "begun"
    begun.mkdir()
    whole = (texts / "texts.jsonl").read_bytes()
    (begun / "texts.partial.jsonl").write_bytes(whole[: len(whole) // 2])  # ends within a line
    run("collect", *REHEARSE, "rehearsal.path=begun")
    assert (begun / "texts.jsonl").read_bytes() == whole
    before = snapshot(begun)
    assert "nothing to do" in run("collect", *REHEARSE, "rehearsal.path=begun").out
    assert snapshot(begun) == before


def train(run: Run, folder: Path, output: str, *argv: str) -> list[dict[str, Any]]:
    run("train", "train.loss=full", "optimizer.name=adamw", "train.iters=6", f"output={output}", *REHEARSE, *argv)
    return metrics(folder / output)


@pytest.fixture(scope="module")
def rehearsed(run: Run, texts: Path, folder: Path) -> list[dict[str, Any]]:
    """A run with texts and prompts, with a checkpoint half-way."""
    return train(run, folder, "run", "rehearsal.prompts=0.5", "train.save=saved", "train.save_interval=3")


def test_the_log_has_the_terms_apart(rehearsed: list[dict[str, Any]]) -> None:
    first, last = rehearsed[0], rehearsed[-1]
    assert abs(first["rehearsal/kl"]) < 1e-4 and abs(first["prompts/kl"]) < 1e-4  # the model is the base model
    assert last["rehearsal/kl"] > 1e-3 and last["prompts/kl"] > 1e-3 and last["lm loss"] < first["lm loss"]
    assert first["replay/positions"] >= 171  # the domain's alone


@pytest.mark.matrix(1)
@pytest.mark.parametrize("ranks", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks_change_nothing(run: Run, folder: Path, rehearsed: list[dict[str, Any]], ranks: list[str]) -> None:
    name = f"run-{'-'.join(ranks).strip('-')}"
    there = train(run, folder, name, "rehearsal.prompts=0.5", *ranks)
    for key in ("lm loss", "rehearsal/kl", "prompts/kl", "grad-norm", "replay/positions"):
        assert [row[key] for row in there] == pytest.approx([row[key] for row in rehearsed], rel=2e-4, abs=1e-5), key


def test_resume_ends_where_the_uninterrupted_run_ends(run: Run, folder: Path, rehearsed: list[dict[str, Any]]) -> None:
    (Path(shutil.copytree(folder / "saved", folder / "half")) / "latest_checkpointed_iteration.txt").write_text("3")
    there = train(run, folder, "resumed", "rehearsal.prompts=0.5", "train.load=half")
    for key in ("iteration", "lm loss", "rehearsal/kl", "prompts/kl", "grad-norm"):
        assert [row[key] for row in there] == [row[key] for row in rehearsed[3:]], key


def test_rehearsal_keeps_the_models_own_texts(run: Run, texts: Path, folder: Path) -> None:
    """After the same steps the texts are likelier than without rehearsal, whatever the domain's loss."""
    found = {}
    for weight in ("0", "4"):
        train(run, folder, f"w{weight}", f"rehearsal.weight={weight}", f"train.save=s{weight}")
        run("evaluate", f"model=s{weight}", "evaluate.targets=texts", f"evaluate.output=own{weight}.json")
        found[weight] = json.loads((folder / f"own{weight}.json").read_text())["targets"]["nll"]
    assert found["4"] < found["0"] - 0.02


@pytest.mark.matrix(2)
@pytest.mark.parametrize(
    "keys",
    [
        ["train.loss=restricted"],
        ["train.loss=sampled", "optimizer.name=moclip"],
        ["adapter.rank=2"],
        ["rehearsal.loss=kl_rest"],
        ["rehearsal.every=2"],
        ["data.share_prefixes=true", "data.group_prefixes=true"],
    ],
    ids=lambda keys: keys[0],
)
def test_it_goes_with_other_settings(run: Run, tiny: Tiny, texts: Path, folder: Path, keys: list[str]) -> None:
    name = f"with-{keys[0]}"
    store = [f"train.store={tiny.store}"] if keys[0].startswith("train.loss") else []
    rows = train(run, folder, name, *store, *keys)
    told = [row.get("rehearsal/kl") for row in rows]
    assert [value is None for value in told] == [keys[0] == "rehearsal.every=2" and i % 2 == 1 for i in range(6)]
    assert abs(told[0]) < 1e-4 and all(value > 0 for value in told[1:] if value is not None)


def test_cross_entropy_on_the_texts_is_another_name_in_the_log(run: Run, texts: Path, folder: Path) -> None:
    rows = train(run, folder, "nll", "rehearsal.loss=full")
    assert "rehearsal/kl" not in rows[0] and rows[-1]["rehearsal/nll"] > 1


@pytest.fixture
def prepared(bench: Bench, texts: Path) -> Bench:
    shutil.copytree(texts, bench.folder / "texts")
    return bench


def test_chat_writes_a_request_and_an_answer(bench: Bench) -> None:
    """The parts of the template between them are given, not written."""
    (bench.model / "chat_template.jinja").write_text(CHAT)
    argv = bench.command("collect", "collect.store=", "rehearsal.path=chat", *TEXTS, "rehearsal.max_new_tokens=300")
    done = bench.served(*argv, cwd=bench.folder)
    assert done.code == 0, done.err
    about, *lines = map(json.loads, (bench.folder / "chat" / "texts.jsonl").read_text().splitlines())
    assert about["source"] == ["chat"]
    answered = [line for line in lines if len(line["written"]) == 2]
    assert answered, "none of the requests came to its end"
    for line in answered:
        (start, stop), (begin, _) = line["written"]
        assert line["text"].startswith("<|start|>user:") and line["ids"][stop - 1] == 256
        assert bytes(line["ids"][:start]).decode("latin-1") and begin - stop == len("<|start|>assistant:")


def test_texts_and_prompts_of_a_file(bench: Bench) -> None:
    write_lines(bench.folder / "mine.jsonl", [{"text": f"text number {i} of mine"} for i in range(3)])
    write_lines(bench.folder / "asked.jsonl", [{"prompt": "what?"}, {"prompt": "why?"}])
    for source, file, count in (("text", "mine.jsonl", 3), ("prompts", "asked.jsonl", 10)):
        words = ["collect.store=", f"rehearsal.path={source}", f"rehearsal.source=[{source}]", f"rehearsal.file={file}"]
        done = bench.served(*bench.command("collect", *words, *TEXTS), cwd=bench.folder)
        assert done.code == 0, done.err
        assert len(load_texts(bench.folder / source)) == count
    asked = {tuple(text.ids[: int(text.mask.argmax())]) for text in load_texts(bench.folder / "prompts")}
    assert len(asked) == 2  # both prompts, in turn


REFUSED: dict[str, tuple[Callable[[Bench], object], list[str], str]] = {
    "texts of another model": (
        lambda b: b.tensors(lambda held: held.update({k: v + 1 for k, v in held.items()})),
        ["train", "train.loss=full", "train.store=", *REHEARSE],
        "texts/store: collected with base model",
    ),
    "texts that are unfinished": (
        lambda b: (b.folder / "texts" / "texts.jsonl").rename(b.folder / "texts" / "texts.partial.jsonl"),
        ["train", *REHEARSE],
        "texts: its texts are unfinished; run collect with this rehearsal.path first",
    ),
    "no texts": (
        lambda b: shutil.rmtree(b.folder / "texts"),
        ["train", *REHEARSE],
        "texts: there are no texts; run collect with this rehearsal.path first",
    ),
    "damaged texts": (
        lambda b: (b.folder / "texts" / "texts.jsonl").write_text('{"a": 1}\n{"ids": 3}\n'),
        ["train", *REHEARSE],
        "texts/texts.jsonl: damaged (",
    ),
    "no prompts": (
        lambda b: shutil.rmtree(b.folder / "texts" / "prompts"),
        ["train", *REHEARSE, "rehearsal.prompts=1"],
        "rehearsal.prompts=1: texts holds no sets of prompts; run collect with that key first",
    ),
    "other settings": (
        lambda b: None,
        ["collect", *REHEARSE, "collect.store=", "rehearsal.temperature=0.5"],
        "written with temperature 1.0, but this run has 0.5",
    ),
    "no file": (
        lambda b: None,
        ["collect", "rehearsal.path=new-texts", "rehearsal.source=[text]"],
        "source=text takes its text from file, which is not set",
    ),
    "an empty file": (
        lambda b: (b.folder / "empty.jsonl").write_text(""),
        ["collect", "collect.store=", "rehearsal.path=x", "rehearsal.source=[text]", "rehearsal.file=empty.jsonl"],
        "empty.jsonl: empty; expected at least one record",
    ),
    "no chat template": (
        lambda b: None,
        ["collect", "collect.store=", "rehearsal.path=x", "rehearsal.source=[chat]"],
        "rehearsal.source=chat needs a chat template, and this model has none; use rehearsal.source=free",
    ),
    "fewer texts than replicas": (
        lambda b: None,
        ["train", "train.loss=full", "train.store=", *REHEARSE, "rehearsal.share=0.01", *TWO],
        "rehearsal.share=0.01 gives 1 texts a step, which cannot be dealt to 2 data-parallel replicas; raise it",
    ),
    "a negative weight": (lambda b: None, ["train", "rehearsal.weight=-1"], "weight is a factor of a loss, at least 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(prepared: Bench, name: str) -> None:
    spoil, argv, says = REFUSED[name]
    spoil(prepared)
    assert says in prepared.refused(*argv, out=True)


def test_noise_draws_from_the_softmax() -> None:
    """Gumbel-max: the frequencies of 4,000 draws are the probabilities, to four standard errors."""
    from megatron_replay.parallel.sampling import Sampling

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    drawn = torch.stack([(logits / 0.7 + row).argmax() for row in Sampling(0.7, seed=3).noise(range(4000), 0, 5)])
    expected = (logits / 0.7).softmax(0)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((drawn.bincount(minlength=5) / 4000 - expected).abs() < 4 * error).all()
    again = Sampling(0.7, seed=3, numbers=(7, 5)).noise([1], 4, 5)
    assert torch.equal(again, Sampling(0.7, seed=3).noise([5], 4, 5))
