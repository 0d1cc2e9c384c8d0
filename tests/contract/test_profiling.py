"""A run's account of its time: the phases of each step, and the trace that `--profile` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from served import Done, Served
from tinymodel import SETTINGS, Tiny


@pytest.fixture
def trained(served: Served, tiny: Tiny, tmp_path: Path) -> Any:
    def train(*argv: str, code: int = 0) -> Done:
        places = [f"model={tiny.model}", f"data.path={tiny.data}", f"train.store={tiny.store}", "output=out"]
        done = served("train", *places, *SETTINGS, *argv, cwd=tmp_path)
        assert done.code == code, done.out + done.err
        return done

    return train


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def phases(row: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("time/"): spent for name, spent in row.items() if name.startswith("time/")}


def test_the_phases_add_up_to_the_step(trained: Any, tmp_path: Path) -> None:
    trained("train.iters=6", "train.save=saved", "train.save_interval=2", "train.loss=full")
    left = []
    for row in rows(tmp_path):
        told = phases(row)
        saved = told.pop("checkpoint", None)
        assert (saved is not None) is (row["iteration"] in (3, 5)), "the save after step 2 is told with step 3"
        assert set(told) == {"data", "forward", "head", "loss", "backward", "reduce", "optimizer"}
        left.append((row["iteration-time"] - sum(told.values())) / max(row["iteration-time"], 0.05))
    # a busy machine may stop any step between two phases, but not all of them
    assert min(left) >= 0 and min(left) <= 0.1, left


@pytest.mark.parametrize(("layout", "more"), [("layout.tensor=2", set()), ("layout.pipeline=2", {"pipeline"})])
def test_the_slowest_rank_is_told(trained: Any, tmp_path: Path, layout: str, more: set[str]) -> None:
    """The main rank writes the head's time though another rank has the head."""
    trained("train.iters=2", layout, "--ranks", "2")
    for row in rows(tmp_path):
        assert set(phases(row)) == {"data", "forward", "head", "loss", "backward", "reduce", "optimizer"} | more
        assert all(0 < spent <= row["iteration-time"] for spent in phases(row).values())


def test_tensorboard_has_the_phases(trained: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained("train.iters=1")
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    board.Reload()
    assert {"time/head", "time/backward", "time/optimizer"} <= set(board.Tags()["scalars"])


def test_profile_writes_a_chrome_trace_of_every_rank(trained: Any, tmp_path: Path) -> None:
    done = trained("train.iters=5", "--profile", "--ranks", "2")
    assert "wrote a trace of steps 2 to 4 to out/trace, one file a rank" in done.out
    for rank in range(2):
        events = json.loads((tmp_path / "out" / "trace" / f"rank{rank}.json").read_text())["traceEvents"]
        spans = [
            event["name"]
            for event in events
            if event.get("cat") == "user_annotation" and event["name"].startswith("time/")
        ]
        assert (spans.count("time/data"), spans.count("time/head")) == (3, 6), "three steps of two micro-batches"
        assert {f"time/{name}" for name in ("forward", "loss", "backward", "reduce", "optimizer")} <= set(spans)
        assert any(event["name"].startswith("megatron_replay::restricted_fwd") for event in events), (
            "the operators are in it too"
        )


def test_a_window_to_the_last_step(trained: Any, tmp_path: Path) -> None:
    done = trained("train.iters=2", "train.profile=[2,2]")
    assert (
        "wrote a trace of steps 2 to 2 to out/trace" in done.out
        and (tmp_path / "out" / "trace" / "rank0.json").is_file()
    )


@pytest.mark.parametrize(
    ("window", "says"),
    [
        ("[2,4]", "train.profile=[2, 4]: this run has 3 steps"),
        ("[3]", "such as [2, 4], got [3]"),
        ("[3,2]", "such as [2, 4], got [3, 2]"),
    ],
)
def test_a_window_that_cannot_be_is_refused(trained: Any, window: str, says: str) -> None:
    assert says in trained("train.iters=3", f"train.profile={window}", code=2).err
