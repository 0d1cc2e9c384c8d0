"""The peak that `train --dry-run` prints, against the peak of the process that then trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from served import Served
from tinymodel import QWEN3, write_lines, write_model

ROOT = Path(__file__).resolve().parents[2]
LARGER = {**QWEN3, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 32_768}
"""Large enough that what is held is more than what a process takes for itself."""
RUN = """
import sys
from megatron_replay.cli_args import configuration
from megatron_replay.device import CPU
from megatron_replay.stages.train import run

config = configuration(None, sys.argv[1:])
run(config, dry_run=True)
run(config)
print("held at most", CPU.peak_memory())
"""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_MAX_": "1000000"}
"""Freed memory goes back to the system, so that resident memory is what is held."""
COMPILED = 40e6
"""Memory that oneDNN keeps for the bfloat16 products that it compiled, one for every shape.

It is much beside a model as small as this one.
"""
ROW = re.compile(r"^ +(\d+)((?: +[\d,]+){8})  (\w+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, served: Served) -> list[str]:
    folder = tmp_path_factory.mktemp("larger")
    model = write_model(folder / "model", LARGER)
    data = write_lines(folder / "data.jsonl", [{"prompt": f"{i}", "completion": f"{i} " * 60} for i in range(8)])
    given = [f"model={model}", f"data.path={data}", "device=cpu", "data.seq_length=256", "batch.total=2"]
    done = served("collect", *given, f"collect.store={folder / 'store'}", cwd=folder)
    assert done.code == 0, done.err
    return [
        *given,
        f"train.store={folder / 'store'}",
        "train.iters=2",
        "train.tensorboard=false",
        f"output={folder / 'out'}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [["train.loss=restricted", "precision=fp32"], ["train.loss=full", "precision=bf16", "layout.zero1=false"]],
    ids=["restricted fp32", "full bf16 without ZeRO-1"],
)
def test_the_dry_run_predicts_the_peak(settings: list[str], changes: list[str]) -> None:
    env = {
        **os.environ,
        **RETURNED,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", RUN, *settings, *changes]
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    found = ROW.search(out)
    assert found, out
    *parts, base, total = (float(number.replace(",", "")) * 1e6 for number in found[2].split())
    assert total == pytest.approx(sum(parts) + base, abs=5e6), "the parts are rounded to a million"
    held = float(re.search(r"held at most (\d+)", out)[1])  # type: ignore[index]
    assert held - base > 100e6
    assert total == pytest.approx(held, rel=0.15), out
    assert abs(total - held) <= 0.15 * (held - base) + COMPILED, out


def test_a_row_for_each_pipeline_stage(settings: list[str], served: Served, tmp_path: Path) -> None:
    done = served("train", *settings, "layout.pipeline=2", "--ranks", "2", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "memory of a rank at its peak, predicted, MB:" in done.out
    assert [row[0] for row in ROW.findall(done.out)] == ["0", "1"], done.out
