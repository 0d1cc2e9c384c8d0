"""A comparison of recipes from the command line: resumable, one store for all, one line a run, and a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench import Bench
from served import Served
from tinymodel import Tiny


def study(tiny: Tiny, **changes: Any) -> dict[str, Any]:
    """Three recipes, two rates: full, restricted, and rehearsed."""
    return {
        "output": "out",
        "rates": [1e-2],
        "seeds": [1],
        "gain": "targets.data.nll",
        "forgetting": ["targets.own.nll"],
        "run": {
            "model": str(tiny.model),
            "device": "cpu",
            "data": {"path": str(tiny.data), "seq_length": 128},
            "collect": {"k_max": 20, "strategy": "all"},
            "rehearsal": {"samples": 6, "max_new_tokens": 10, "weight": 0.0},
            "train": {"loss": "full", "iters": 3},
            "optimizer.name": "adamw",
            "batch.total": 2,
            "evaluate": {"targets": {"data": str(tiny.data), "own": str(tiny.data)}},
        },
        "recipes": {
            "plain": {"rates": [1e-3, 1e-2]},
            "restricted": {"train.loss": "restricted"},
            "rehearsed": {"rehearsal.weight": 1.0},
        },
        **changes,
    }


def test_one_run_alone_and_what_is_left(served: Served, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(tiny)))
    for name in ("base", "plain/lr0.001/seed1"):
        done = served("ablate", "study.yaml", "--arm", name, cwd=tmp_path)
        assert done.code == 0, done.err
    done = served("ablate", "study.yaml", "--dry-run", cwd=tmp_path)
    assert "5 runs, 2 done, 3 to do" in done.out and "plain/lr0.001" not in done.out
    told = served("ablate", "study.yaml", "--report", cwd=tmp_path).out
    assert "| base | 0 | 0 |" in told and "| plain | 0.001 | 1 |" in told


@pytest.mark.slow
def test_all_runs_once_and_a_report(served: Served, tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(tiny)))
    dry = served("ablate", "study.yaml", "--dry-run", cwd=tmp_path)
    assert dry.code == 0 and "5 runs, 0 done, 5 to do" in dry.out and "rehearsed/lr0.01/seed1" in dry.out
    done = served("ablate", "study.yaml", "--workers", "2", cwd=tmp_path, within=600)
    assert done.code == 0, done.out + done.err
    assert len(list((tmp_path / "out" / "stores").iterdir())) == len(list((tmp_path / "out" / "texts").iterdir())) == 1
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        rows = {(row["recipe"], row["rate"]): row for row in csv.DictReader(file)}
    assert set(rows) == {
        ("base", "0"),
        ("plain", "0.001"),
        *((recipe, "0.01") for recipe in ("plain", "rehearsed", "restricted")),
    }
    before = float(rows["base", "0"]["targets.data.nll"])
    assert all(float(row["targets.data.nll"]) < before for key, row in rows.items() if key[0] != "base")
    assert rows["rehearsed", "0.01"]["rehearsal/kl"] and not rows["plain", "0.01"]["rehearsal/kl"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## All runs" in report and "## Forgetting at equal targets.data.nll" in report and report in done.out
    assert (tmp_path / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    # again: nothing is left; another seed, or a key that changes a run: only what is new
    assert "5 runs, 5 done, 0 to do" in served("ablate", "study.yaml", "--report", cwd=tmp_path).out
    assert "9 runs, 5 done, 4 to do" in served("ablate", "study.yaml", "seeds=[1, 2]", "--dry-run", cwd=tmp_path).out
    assert "5 runs, 0 done" in served("ablate", "study.yaml", "run.train.iters=4", "--dry-run", cwd=tmp_path).out


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_the_others_go_on(served: Served, tiny: Tiny, tmp_path: Path) -> None:
    recipes = {"plain": {"rates": [1e-3]}, "wild": {"rates": [1e30], "train.max_skipped": 1}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study(tiny, recipes=recipes)))
    done = served("ablate", "study.yaml", "--workers", "1", cwd=tmp_path, within=600)
    assert done.code == 1 and "wild/lr1e+30/seed1 failed with exit code 2; see out/runs/wild" in done.err
    row = json.loads((tmp_path / "out" / "runs" / "plain" / "lr0.001" / "seed1" / "row.json").read_text())
    assert row["recipe"] == "plain" and row["costs"]["steps"] == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipes": {}}, "recipes is empty; name at least one"),
        ({"recipes": {"base": {}}}, "recipes.base: this name is the untrained model's"),
        ({"recipes": {"a": {}}, "rates": []}, "recipes.a: no rates; set rates=[1e-5, ...]"),
        ({"recipes": {"a": {"optimizer.nam": "x", "train.los": "full"}}}, "recipes.a: train.los: unknown key; did you"),
        ({"seeds": []}, "seeds is empty"),
        ({"colour": 1}, "colour: unknown key"),
    ],
    ids=["no recipe", "base", "no rates", "unknown key", "no seeds", "unknown part"],
)
def test_refused(bench: Bench, changes: dict[str, Any], says: str) -> None:
    (bench.folder / "study.yaml").write_text(yaml.safe_dump(study(bench.tiny, **changes)))
    assert says in bench.refused("ablate", "study.yaml")


def test_an_unknown_run_is_refused(bench: Bench) -> None:
    (bench.folder / "study.yaml").write_text(yaml.safe_dump(study(bench.tiny)))
    assert "unknown run 'plan/lr0.01/seed1'; did you mean 'plain/lr0.01/seed1'?" in bench.refused(
        "ablate", "study.yaml", "--arm", "plan/lr0.01/seed1"
    )
    assert "needs one file that names the recipes, got 0" in bench.refused("ablate")
