"""A user's whole way through the command line on a tiny model: convert, collect, train, resume, measure, generate,
export."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from served import Done, Served
from tinymodel import SETTINGS, Tiny, write_lines, write_tokenizer

from megatron_replay import config
from megatron_replay.data.samples import load_samples
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.runtime.questions import questions_path, read_rows

STEPS = 6
TWO = ["--ranks", "2"]
NUMBER = r"\d\.\d{6}E[+-]\d\d"
LINE = re.compile(
    r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +(?P<iteration>\d+)/ +(?P<total>\d+) \| consumed samples: "
    r"+(?P<samples>\d+) \|"
    rf" elapsed time per iteration \(ms\): (?P<ms>\d+\.\d) \| learning rate: (?P<rate>{NUMBER}) \|"
    rf" global batch size: +(?P<batch>\d+) \| lm loss: (?P<loss>{NUMBER}) \| loss scale: 1\.0 \| grad norm: "
    r"(?P<norm>\d+\.\d{3}) \|"
    r" number of skipped iterations: +(?P<skipped>\d+) \| number of nan iterations: +(?P<nan>\d+) \|"
)
"""The line of Megatron's training_log, field for field."""

Run = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("way")


@pytest.fixture(scope="module")
def run(served: Served, tiny: Tiny, folder: Path) -> Run:
    """`run("train", "train.store=s", code=0)`: the command with model, data and SETTINGS filled in, which must end with
    that exit code."""

    def go(verb: str, *argv: str, code: int = 0) -> Done:
        keyless = verb in ("store", "convert", "compare")
        plain = () if keyless else (f"model={tiny.model}", f"data.path={tiny.data}", *SETTINGS)
        done = served(verb, *plain, *argv, cwd=folder)
        assert done.code == code, done.out + done.err
        return done

    return go


def content(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_convert_there_and_back(run: Run, tiny: Tiny, folder: Path) -> None:
    there = run("convert", str(tiny.model), "there", "--verify")
    assert re.search(r"verified: 24 tensors equal by sha256, logits of 62 positions differ by at most 0\n", there.out)
    assert "verified: 24 tensors" in run("convert", "there", "back", "--verify").out
    ours, theirs = load_file(tiny.model / "model.safetensors"), load_file(folder / "back" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / "back" / name).read_bytes() == (tiny.model / name).read_bytes()


@pytest.mark.parametrize("ranks", [[], ["layout.tensor=2"], ["layout.pipeline=2"]], ids=["data", "tensor", "pipeline"])
def test_collect_on_two_ranks_gives_the_same_store(run: Run, tiny: Tiny, ranks: list[str]) -> None:
    name = f"two-{'-'.join(ranks) or 'data'}"
    run("collect", f"collect.store={name}", *TWO, *ranks)
    found = json.loads(run("store", "compare", str(tiny.store), name, "--json").out)
    assert found["same"] is True


def test_collect_again_has_nothing_to_do(run: Run, tiny: Tiny) -> None:
    before = content(tiny.store)
    assert (
        "complete already, with these settings and this data; nothing to do"
        in run("collect", f"collect.store={tiny.store}").out
    )
    assert content(tiny.store) == before


def test_collect_says_what_it_would_take(run: Run, folder: Path) -> None:
    done = run("collect", "collect.store=dry", "--dry-run")
    assert re.search(r"12 samples, about 171 positions, [\d.]+ \wi?B, \d+ s \(from 8 samples\)", done.out)
    assert not (folder / "dry").exists()


def test_collect_killed_half_way_and_run_again(run: Run, served: Served, tiny: Tiny, folder: Path) -> None:
    """The store of a run that was killed and started again is, byte for byte, that of one left alone."""
    data = write_lines(folder / "long.jsonl", [{"prompt": f"{i}", "completion": f"{i:03d} " * 24} for i in range(120)])
    settings = [f"data.path={data}", "collect.k_max=200", "collect.tau=1.0", "collect.strategy=all"]
    run("collect", *settings, "collect.store=alone")
    killed = folder / "killed"
    job = served.start("collect", f"model={tiny.model}", *SETTINGS, *settings, "collect.store=killed", cwd=folder)
    until = time.monotonic() + 60
    while not any(file.stat().st_size > 200_000 for file in killed.glob("segments/*.mrs")):
        assert time.monotonic() < until, job.err
        time.sleep(0.002)
    job.kill()
    assert job.wait().code == -9 and not (killed / "manifest.json").exists()
    assert "unfinished" in run("store", "verify", "killed", code=2).err
    run("collect", *settings, "collect.store=killed")
    assert content(killed) == content(folder / "alone")


def test_look_into_the_store(run: Run, tiny: Tiny, folder: Path) -> None:
    inspected = json.loads(run("store", "inspect", str(tiny.store), "--json").out)
    assert inspected["state"] == "complete" and inspected["tau"] == 0.95 and inspected["counts"]["samples"] == 12
    assert json.loads(run("store", "verify", str(tiny.store), "--json").out)["ok"] is True
    stats = json.loads(run("store", "stats", str(tiny.store), "--json").out)
    run("store", "export", str(tiny.store), "--output", "rows.jsonl")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == stats["positions"] == 171 and sum(len(row["ids"]) for row in rows) == stats["ids"]
    assert all(row["gold"] in row["ids"] and row["ids"] == sorted(row["ids"]) for row in rows)


def test_the_stop_token_in_every_set(run: Run, tiny: Tiny, folder: Path) -> None:
    run("collect", "collect.store=stopped", "collect.stop_token=true", "collect.k_max=3")
    always = json.loads(run("store", "inspect", "stopped", "--json").out)["always"]
    run("store", "export", "stopped", "--output", "stopped.jsonl")
    rows = [json.loads(line) for line in (folder / "stopped.jsonl").read_text().splitlines()]
    assert len(always) == 1 and rows and all(always[0] in row["ids"] for row in rows)
    assert json.loads(run("store", "verify", "stopped", "--json").out)["ok"] is True
    run("train", "train.store=stopped", "train.iters=1", "output=stopped-run")
    assert "always" in run("collect", "collect.store=stopped", "collect.k_max=3", code=2).err


def test_a_damaged_store_is_repaired_and_collected_again(run: Run, tiny: Tiny, folder: Path) -> None:
    hurt = Path(shutil.copytree(tiny.store, folder / "hurt"))
    segment = next(hurt.glob("segments/*.mrs"))
    spoilt = bytearray(segment.read_bytes())
    spoilt[200] ^= 1
    segment.write_bytes(spoilt)
    assert "does not match its checksum" in run("store", "verify", "hurt", code=1).out
    run("store", "repair", "hurt")
    run("collect", "collect.store=hurt")
    assert json.loads(run("store", "compare", str(tiny.store), "hurt", "--json").out)["same"] is True


@pytest.fixture(scope="module")
def trained(run: Run, tiny: Tiny) -> Done:
    """Restricted loss and MoClip, a checkpoint half-way and at the end."""
    saving = ["train.save=saved", f"train.save_interval={STEPS // 2}"]
    return run("train", f"train.store={tiny.store}", f"train.iters={STEPS}", "output=run", *saving)


def test_train_speaks_megatrons_language(trained: Done, folder: Path) -> None:
    lines = [found.groupdict() for found in map(LINE.match, trained.out.splitlines()) if found]
    assert [int(line["iteration"]) for line in lines] == list(range(1, STEPS + 1))
    written = metrics(folder / "run")
    assert [row["iteration"] for row in written] == list(range(1, STEPS + 1))
    for line, row in zip(lines, written, strict=True):
        assert (
            int(line["total"]) == STEPS
            and int(line["samples"]) == 4 * row["iteration"]
            and line["skipped"] == line["nan"] == "0"
        )
        assert float(line["loss"]) == pytest.approx(row["lm loss"], rel=1e-6)
        assert float(line["rate"]) == pytest.approx(row["learning-rate"], rel=1e-6)
        assert float(line["norm"]) == pytest.approx(row["grad-norm"], abs=1e-3)
        assert {"iteration-time", "tokens-per-sec", "replay/positions"} <= row.keys()
    assert written[-1]["lm loss"] < written[0]["lm loss"]
    assert any(key.startswith("moclip/") for key in written[-1])


def test_a_dry_run_says_how_evenly_the_candidates_lie(run: Run, trained: Done, tiny: Tiny) -> None:
    """On two tensor ranks, with and without stripes; on one there is nothing to say."""
    dry = ["train", f"train.store={tiny.store}", "--dry-run"]
    said = [run(*dry, *TWO, "layout.tensor=2", *stripe).out for stripe in ([], ["layout.stripe=false"])]
    even, uneven = (float(re.findall(r"replay/tp_imbalance (\d\.\d{3}) in the first step", out)[0]) for out in said)
    assert 1 <= even < uneven <= 2
    assert "tp_imbalance" not in run(*dry).out


def test_tensorboard_has_the_same_numbers(trained: Done, folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("lm loss")] == list(range(1, STEPS + 1))
    told = [event.value for event in board.Scalars("grad-norm")]
    assert told == pytest.approx([row["grad-norm"] for row in metrics(folder / "run")], rel=1e-6)


def test_the_configuration_beside_the_logs_is_the_run(trained: Done, folder: Path) -> None:
    again = config.load(config.RunConfig, folder / "run" / "config.yaml")
    assert again.train.iters == STEPS and again.collect.k_max == 20 and again.optimizer.name == "moclip"


@pytest.mark.parametrize("ranks", [[], TWO, [*TWO, "layout.tensor=2"]], ids=["1 rank", "2 replicas", "2 tensor ranks"])
def test_resume_ends_where_the_uninterrupted_run_ends(
    run: Run, trained: Done, tiny: Tiny, folder: Path, ranks: list[str]
) -> None:
    name = f"resumed-{'-'.join(ranks).strip('-')}"
    (Path(shutil.copytree(folder / "saved", folder / name)) / "latest_checkpointed_iteration.txt").write_text(
        str(STEPS // 2)
    )
    shutil.rmtree(folder / name / f"iter_{STEPS:07d}")
    places = [f"output={name}/log", f"train.load={name}", f"train.save={name}"]
    done = run("train", f"train.store={tiny.store}", f"train.iters={STEPS}", *places, *ranks)
    assert f"resumed from {name} at iteration {STEPS // 2}" in done.out
    resumed, whole = metrics(folder / name / "log"), metrics(folder / "run")[STEPS // 2 :]
    assert all(("replay/tp_imbalance" in row) == ("layout.tensor=2" in ranks) for row in resumed)
    exact = 0 if not ranks else 1e-5  # another layout adds up in another order
    for key in ("iteration", "lm loss", "grad-norm", "learning-rate", "replay/positions"):
        assert [row[key] for row in resumed] == pytest.approx([row[key] for row in whole], rel=exact, abs=0), key
    run("convert", name, f"{name}-hf")
    run("convert", "saved", f"{name}-whole")
    ours, theirs = (load_file(folder / f"{name}{kind}" / "model.safetensors") for kind in ("-hf", "-whole"))
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=0, atol=1e-5 if ranks else 0)


def test_train_with_the_full_loss(run: Run, tiny: Tiny, folder: Path) -> None:
    """The baseline is the same program with one key changed; without a store every target counts."""
    run("train", "train.loss=full", "train.iters=2", "output=full", "optimizer.name=adamw", *TWO)
    written = metrics(folder / "full")
    assert len(written) == 2 and written[1]["lm loss"] < written[0]["lm loss"]
    assert written[0]["replay/positions"] >= 171  # four rows, and the data fill three


@pytest.fixture(scope="module")
def questions(folder: Path, tiny: Tiny) -> list[str]:
    """Every measure that evaluate has, as overrides."""
    (folder / "text.txt").write_text("one two three four five six seven " * 10)
    write_lines(
        folder / "choice.jsonl", [{"question": "count", "choices": ["0 1 2", "zzz"], "answer": i % 2} for i in range(4)]
    )
    (folder / "databases").mkdir()
    with sqlite3.connect(folder / "databases" / "shop.sqlite") as database:
        database.executescript("create table t (a integer); insert into t values (1), (2);")
    queries = {"how many?": "select count(*) from t", "all": "select a from t"}
    asked = [{"prompt": prompt, "query": query, "db_id": "shop"} for prompt, query in queries.items()]
    write_lines(folder / "nl2sql.jsonl", asked)
    files = [
        "evaluate.text=text.txt",
        f"evaluate.targets={tiny.data}",
        "evaluate.choice=choice.jsonl",
        "evaluate.nl2sql=nl2sql.jsonl",
    ]
    return [
        *files,
        "evaluate.databases=databases",
        f"evaluate.base={tiny.model}",
        "evaluate.window=64",
        "evaluate.max_new_tokens=8",
    ]


def test_evaluate_everything(run: Run, trained: Done, questions: list[str], folder: Path) -> None:
    before = run("evaluate", *questions, "evaluate.output=before.json")
    assert "text.perplexity" in before.out and "nl2sql.execution" in before.out
    run("evaluate", "model=saved", *questions, "evaluate.output=after.json")
    run("evaluate", "model=saved", *questions, "evaluate.output=two.json", *TWO, "layout.tensor=2")
    base, after, two = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after", "two"))
    assert set(base) == {"model", "version", "text", "targets", "choice", "nl2sql", "base"}
    assert base["targets"]["tokens"] == 171 and base["nl2sql"]["questions"] == 2 and base["base"]["relative_l2"] == 0
    assert after["targets"]["nll"] < base["targets"]["nll"] and after["base"]["relative_l2"] > 0
    assert two["text"]["perplexity"] == pytest.approx(after["text"]["perplexity"], rel=1e-5)
    assert two["base"]["relative_l2"] == pytest.approx(after["base"]["relative_l2"], rel=1e-5)
    assert two["choice"].pop("answer_nll") == pytest.approx(after["choice"].pop("answer_nll"), rel=1e-5)
    assert two["choice"] == after["choice"] and two["nl2sql"] == after["nl2sql"]
    assert two["nl2sql"]["rule"] == "spider" and two["nl2sql"]["gold_failed"] == 0
    rows = [read_rows(questions_path(folder / f"{name}.json")).values() for name in ("after", "two")]
    asked, dealt = ([row | {"seconds": 0} for row in some if row["measure"] == "nl2sql"] for some in rows)
    assert asked == dealt and [row["prompt"] for row in asked] == ["how many?", "all"]


@pytest.fixture(scope="module")
def benchmarks(folder: Path) -> list[str]:
    """Texts, multiple choice and questions to generate for, several of each kind, as overrides."""
    (folder / "one.txt").write_text("one two three four five six seven " * 10)
    documents = [{"text": "seven six five four three two one " * n} for n in (4, 1, 6)]
    write_lines(folder / "other.jsonl", [*documents, {"text": "x"}])
    (folder / "mmlu").mkdir()
    for subject in ("art", "law"):
        rows = [f"what is {i},{i},{i + 1},{i + 2},{'ABC'[i % 3]}" for i in range(5)]
        (folder / "mmlu" / f"{subject}_test.csv").write_text("\n".join(rows) + "\n")
    write_lines(folder / "gsm8k.jsonl", [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(5)])
    bbh = [{"input": f"not {i}", "target": f"({'AB'[i % 2]})"} for i in range(4)]
    (folder / "bbh.json").write_text(json.dumps({"canary": "c", "examples": bbh}))
    return [
        "evaluate.text={one: one.txt, documents: other.jsonl}",
        "evaluate.window=24",
        "evaluate.stride=8",
        "evaluate.choice=mmlu",
        "evaluate.generation=gsm8k.jsonl,bbh.json",
        "evaluate.shots=2",
        "evaluate.max_new_tokens=8",
    ]


def test_evaluate_benchmarks_and_compare(run: Run, trained: Done, benchmarks: list[str], folder: Path) -> None:
    run("evaluate", *benchmarks, "evaluate.output=base.json")
    run("evaluate", "model=saved", *benchmarks, "evaluate.output=tuned.json")
    for layout in ("layout.tensor=2", "layout.pipeline=2", "layout.tensor=1"):
        name = f"{layout.replace('.', '-')}.json"
        run("evaluate", "model=saved", *benchmarks, f"evaluate.output={name}", *TWO, layout)
        found = json.loads(run("compare", "tuned.json", name, "--json").out)
        assert all(abs(its["difference"]) < 1e-4 for its in found.values()), (layout, found)
    base, tuned = (json.loads((folder / f"{name}.json").read_text()) for name in ("base", "tuned"))
    assert list(base["text"]) == ["one", "documents"] and base["text"]["one"]["tokens"] == 339
    assert base["text"]["one"]["nll_low"] < base["text"]["one"]["nll"] < base["text"]["one"]["nll_high"]
    assert base["choice"]["questions"] == 6, "two of five questions of each subject are examples"
    assert (base["choice"]["style"], base["choice"]["answers"], base["choice"]["shots"]) == ("plain", "letters", 2)
    assert base["generation"]["gsm8k"]["questions"] == 3 and base["generation"]["bbh"]["questions"] == 2
    assert {"strict", "flexible"} < set(base["generation"]["gsm8k"]) and "exact" in base["generation"]["bbh"]
    rows = [json.loads(line) for line in (folder / "base.questions.jsonl").read_text().split("\n") if line]
    asked = {row["prompt"] for row in rows if row["measure"] == "generation.bbh.exact"}
    assert "Q: not 0\nA: (A)\n\nQ: not 1\nA: (B)\n\nQ: not 2\nA:" in asked
    found = json.loads(run("compare", "base.json", "tuned.json", "--json").out)
    for measure, value in [("text.one", tuned["text"]["one"]["nll"]), ("choice.nll", tuned["choice"]["answer_nll"])]:
        assert found[measure]["second"] == pytest.approx(value, rel=1e-6)
    assert found["generation.gsm8k.flexible"]["questions"] == 3
    said = run("compare", "base.json", "tuned.json").out
    assert "text.documents" in said and "tuned.json - base.json" in said


def test_questions_in_chat_style_score_the_reply_alone(run: Run, benchmarks: list[str], folder: Path) -> None:
    asked = ["evaluate.choice=mmlu", "evaluate.choice_answers=text", "evaluate.limit=4"]
    run("evaluate", *asked, "evaluate.style=chat", "evaluate.output=chat.json")
    run("evaluate", *asked, "evaluate.output=plain.json")
    chat, plain = (json.loads((folder / f"{name}.json").read_text())["choice"] for name in ("chat", "plain"))
    assert (chat["style"], chat["answers"], chat["questions"]) == ("chat", "text", 4)
    assert chat["answer_nll"] != plain["answer_nll"]
    rows = [json.loads(line) for line in (folder / "chat.questions.jsonl").read_text().split("\n") if line]
    assert [row["measure"] for row in rows[:2]] == ["choice", "choice.normalised"]
    assert {row["subject"] for row in rows} == {"art", "law"}, "a limit takes its share of every subject"


def test_the_export_is_a_model_of_transformers(run: Run, trained: Done, tiny: Tiny, folder: Path) -> None:
    """transformers loads it unchanged, and finds the same likelihoods and the same greedy text as our verbs."""
    transformers = pytest.importorskip("transformers")
    run("convert", "saved", "export", "--verify")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3ForCausalLM"
    tokenizer = load_tokenizer(folder / "export")
    samples = load_samples(config.Data(path=str(tiny.data)), tokenizer)
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            logits = model(torch.from_numpy(sample.ids).long()[None]).logits[0, :, : tokenizer.size].double()
            picked = torch.from_numpy(sample.positions).long()
            gold = torch.from_numpy(sample.ids).long()[picked + 1]
            total += float(torch.nn.functional.cross_entropy(logits[picked], gold, reduction="sum"))
            count += len(picked)
    run("evaluate", "model=export", f"evaluate.targets={tiny.data}", "evaluate.output=export.json")
    assert json.loads((folder / "export.json").read_text())["targets"]["nll"] == pytest.approx(total / count, rel=1e-5)
    prompt = torch.tensor([tokenizer.encode("count from 3")])
    with torch.no_grad():
        answer = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=256, pad_token_id=256)[
            0, prompt.shape[1] :
        ]
    asked = ["count from 3", "generate.raw=true", "generate.max_new_tokens=12"]
    told = run("generate", "model=saved", *asked).out
    assert told == f"count from 3{tokenizer.decode([i for i in answer.tolist() if i < 256])}\n"
    assert run("generate", "model=export", *asked, *TWO, "layout.pipeline=2").out == told


@pytest.fixture(scope="module")
def alike(run: Run, tiny: Tiny, folder: Path) -> list[str]:
    """Questions about two schemas in turn, collected one by one; the settings that name them."""
    schemas = ("table one with columns a, b, c", "table two with columns d, e")
    lines = [{"prompt": f"{schemas[i % 2]}; what is {i}?", "completion": f" {i} {i + 1} {i + 2}"} for i in range(12)]
    settings = [f"data.path={write_lines(folder / 'alike.jsonl', lines)}", "collect.strategy=all"]
    run("collect", *settings, "collect.store=apart")
    return settings


@pytest.mark.parametrize("ranks", [[], TWO, [*TWO, "layout.tensor=2"], [*TWO, "layout.pipeline=2"]], ids=str)
def test_collect_with_shared_prefixes_gives_the_same_sets(run: Run, alike: list[str], ranks: list[str]) -> None:
    name = f"together-{'-'.join(ranks).strip('-')}"
    done = run("collect", *alike, f"collect.store={name}", "data.share_prefixes=true", *ranks)
    total, shared = map(
        int,
        re.search(
            r"(\d+) tokens \((\d+) of them "
            r"shared\)",
            done.out,
        ).groups(),
    )  # type: ignore[union-attr]
    assert shared > 0.4 * total
    assert json.loads(run("store", "compare", "apart", name, "--json").out)["same"] is True


@pytest.mark.parametrize("loss", [["train.store=apart"], ["train.loss=full"]], ids=["restricted", "full"])
def test_train_with_shared_prefixes_takes_the_same_steps(
    run: Run, alike: list[str], folder: Path, loss: list[str]
) -> None:
    """The rows as they are: the same samples a step, so the same losses, and fewer tokens."""
    job = [*alike, *loss, "train.iters=4", "batch.total=2", "optimizer.lr=1e-4", "data.seq_length=256"]
    name = loss[0].partition("=")[2]
    run("train", *job, f"output=apart-{name}")
    run("train", *job, f"output=shared-{name}", "data.share_prefixes=true", *TWO)
    apart, shared = metrics(folder / f"apart-{name}"), metrics(folder / f"shared-{name}")
    for key in ("lm loss", "grad-norm", "replay/positions", "replay/tokens"):
        assert [row[key] for row in shared] == pytest.approx([row[key] for row in apart], rel=1e-5), key
    assert (
        all(row["replay/shared_tokens"] == 0 for row in apart)
        and sum(row["replay/shared_tokens"] for row in shared) > 100
    )


def test_grouped_rows_take_more_samples_and_resume(run: Run, alike: list[str], folder: Path) -> None:
    job = [*alike, "train.loss=full", "batch.total=1", "optimizer.lr=1e-4", "data.share_prefixes=true"]
    assert re.search(r"12 samples in 6 rows", run("train", *job, "--dry-run").out)
    grouped = [*job, "data.group_prefixes=true"]
    rows = int(
        re.search(
            r"12 samples in (\d+) "
            r"rows",
            run("train", *grouped, "--dry-run").out,
        )[1]
    )  # type: ignore[index]
    assert rows <= 4
    run("train", *grouped, "train.iters=4", "output=grouped", "train.save=grouped-saved", "train.save_interval=2")
    whole = metrics(folder / "grouped")
    assert sum(row["replay/shared_tokens"] for row in whole) > 0.4 * sum(row["replay/tokens"] for row in whole)
    (folder / "grouped-saved" / "latest_checkpointed_iteration.txt").write_text("2")
    run("train", *grouped, "train.iters=4", "output=grouped-again", "train.load=grouped-saved")
    assert [row["lm loss"] for row in metrics(folder / "grouped-again")] == [row["lm loss"] for row in whole[2:]]
    assert "set share_prefixes=true" in run("train", *alike, "train.loss=full", "data.group_prefixes=true", code=2).err


def test_evaluate_with_shared_prefixes(run: Run, alike: list[str], questions: list[str], folder: Path) -> None:
    asked = [questions[2], f"evaluate.targets={alike[0].partition('=')[2]}"]
    run("evaluate", *asked, "evaluate.output=apart.json")
    for ranks in ([], [*TWO], [*TWO, "layout.pipeline=2"]):
        run("evaluate", *asked, "evaluate.output=shared.json", "data.share_prefixes=true", *ranks)
        apart, shared = (json.loads((folder / f"{name}.json").read_text()) for name in ("apart", "shared"))
        for part in ("choice", "targets"):
            assert shared[part].keys() == apart[part].keys()
            for key, value in apart[part].items():
                assert shared[part][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (
                    part,
                    key,
                )


def test_the_end_of_a_turn_goes_with_the_model(served: Served, tiny: Tiny, tmp_path: Path) -> None:
    """A base model's files name another eos than its chat template ends replies with: told, used, and exported."""
    model = Path(shutil.copytree(tiny.model, tmp_path / "model"))
    write_tokenizer(model, "<|turn|>")  # 257, which the embedding has room for
    template = "{% for m in messages %}{{ m['content'] + '<|turn|>' }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    settings = ["model=model", f"data.path={tiny.data}", *SETTINGS]
    done = served("train", *settings, "train.loss=full", "train.iters=1", "train.save=saved", cwd=tmp_path)
    assert done.code == 0 and "replies end with <|turn|> (257), and the model's files name <|end|> (256)" in done.err
    assert served("convert", "saved", "export", cwd=tmp_path).code == 0
    for folder in ("saved/hf", "export"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == [257, 256]
    assert "replies end" not in served("generate", "hm", "model=export", *SETTINGS, cwd=tmp_path).err
