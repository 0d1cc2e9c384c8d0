"""The convergence study: its measures, a tiny study from end to end, and a page whose tables are the file's numbers."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"date": "2000-01-01", "commit": "none", "command": "pytest", "machine": "none"}


def load(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


load("rows")
convergence, report = load("convergence"), load("convergence_report")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=258, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=256, **sizes)
    )


@pytest.fixture(scope="module")
def task(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(300)]  # no two windows are alike
    records = [json.dumps({"question": name[:32], "query": name[32:]}) for name in names]
    (folder / "domain.jsonl").write_text("\n".join(records))
    return convergence.make_task(model, folder, folder / "domain.jsonl", ["question", "query"], length=16)


def test_the_domain_is_held_out_and_begins_with_the_start_token(task: Any) -> None:
    assert len(task.probe) == 8 and len(task.domain) == 64 and task.retention.shape == (16, 128)
    assert all((ids[:, 0] == 256).all() for ids in (task.train, task.probe, task.domain, task.retention))
    seen = {tuple(row) for row in task.train.tolist()}
    assert not seen & {tuple(row) for row in torch.cat([task.probe, task.domain]).tolist()}


@pytest.mark.slow
def test_a_study_from_end_to_end(
    model: LlamaForCausalLM, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = {"moclip-45-layer-project", "moclip-45-v-clipped", "tam-adatamw", "muon"}
    methods = tuple(m for m in convergence.EVERY if m in convergence.SWEPT or m.name in extra)
    plan = convergence.Plan(lr=1e-3, high_lr=1e-2, sweep=(3e-3,), seeds=1, steps=4, methods=methods)
    output = tmp_path / "found.csv"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    convergence.study(model, task, plan, output, about=ABOUT)
    rows = convergence.read_rows(output)
    assert len(rows) == len(plan.runs()) == 2 * (len(methods) + 1) + 2 * len(convergence.SWEPT)
    for setting in ("good", "high"):
        (uncapped,) = report.chosen(rows, setting=setting, method="moclip-90")
        assert uncapped["weights"] == report.chosen(rows, setting=setting, method="adam_atan2", seed="0")[0]["weights"]
        steps = [
            row
            for row in report.chosen(rows, setting=setting)
            if row["method"] not in ("moclip-90", "moclip-45-restart")
        ]
        assert len({row["weights"] for row in steps}) == len(steps) == len(methods) - 1, "two methods made the same run"
    assert all(float(row["distance"]) > 0 and len(convergence.curve_of(row)) == 3 for row in rows)

    # a run that was lost is done again, the same; the others are not repeated
    convergence.write_rows(output, rows[:-1])
    model.load_state_dict(before)
    convergence.study(model, task, plan, output, about=ABOUT)
    drop = {"cpu_seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in convergence.read_rows(output)] == [
        {k: v for k, v in row.items() if k not in drop} for row in rows
    ]
    monkeypatch.setattr(convergence, "run", lambda *_, **__: pytest.fail("repeated a run that the file has"))
    convergence.study(model, task, plan, output, about=ABOUT)

    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    page.write_text("before\n<!-- table good -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", str(output), "--page", str(page), "--figure", str(figure)])
    report.main()
    assert (
        "| `adamw-tuned` |" in page.read_text()
        and "old" not in page.read_text()
        and page.read_text().endswith("after\n")
    )
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_layer_is_what_the_name_says(model: LlamaForCausalLM) -> None:
    shards = convergence.Layered(model)
    named = dict(model.named_parameters())
    place = shards.place(list(named.values()))
    assert [place.layers[i] for i, name in enumerate(named) if name.startswith("model.layers.1.")] == [1] * 9
    assert set(place.layers) == {-1, 0, 1}


def test_a_trend_is_not_counted_as_unrest() -> None:
    steps = np.arange(40.0)
    noise = np.random.default_rng(0).normal(size=40)
    assert convergence.detrended_sd(0.01 * steps**2 - steps) < 1e-9
    assert convergence.detrended_sd(noise - steps) == pytest.approx(convergence.detrended_sd(noise))
    assert 0.5 < convergence.detrended_sd(noise) < 1.0


def test_steps_to_a_target_wait_for_the_mean_of_five() -> None:
    # (4 + 3 + 2 + 1 + 1) / 5 = 2.2
    assert convergence.steps_to([5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0], target=2.2) == "10"
    assert convergence.steps_to([5.0, 4.0], target=1.0) == ""


def test_the_pages_tables_are_the_files_numbers() -> None:
    rows = report.read_rows(ROOT / "benchmarks/results/convergence.csv")
    page = (ROOT / "docs/reports/convergence.md").read_text(encoding="utf-8")
    made = report.tables(rows)
    assert all(f"<!-- table {name} -->" in page for name in made)
    assert report.filled(page, made) == page, "run benchmarks/convergence_report.py (the page says how)"


def test_the_published_study_is_whole() -> None:
    rows = report.read_rows(ROOT / "benchmarks/results/convergence.csv")
    for setting in ("good", "high"):
        here = report.chosen(rows, setting=setting)
        assert {row["method"] for row in here} == {m.name for m in (*convergence.EVERY, convergence.UNCAPPED)}
        assert all(len(report.chosen(here, method=m.name)) == 3 for m in convergence.EVERY)
        (uncapped,) = report.chosen(here, method="moclip-90")
        assert uncapped["weights"] == report.chosen(here, method="adam_atan2", seed="0")[0]["weights"]
    target = convergence.target_of(rows, float(report.chosen(rows, setting="good")[0]["lr"]))
    assert all(row["steps_to_target"] == convergence.steps_to(convergence.curve_of(row), target) for row in rows)


def test_the_figure_is_small_and_redrawn_from_the_file(tmp_path: Path) -> None:
    report.draw(report.read_rows(ROOT / "benchmarks/results/convergence.csv"), tmp_path / "again.png")
    for path in (tmp_path / "again.png", ROOT / "docs/img/convergence.png"):
        assert path.stat().st_size < 150_000
