"""docs/reports/performance.md shows the numbers in benchmarks/results, and the benchmarks of the operators run."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    page = (ROOT / "docs" / "reports" / "performance.md").read_text(encoding="utf-8")
    assert {"loss", "targets", "logits", "topk", "step", "prefix", "scale"} == set(
        re.findall(r"<!-- (\w+) -->\n\|", page)
    )
    assert report.filled(page) == page, "run python benchmarks/report.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "loss",
            ["--vocab", "3000", "--hidden", "32", "--positions", "40", "--only", "ours", "soft", "plain", "unions"],
        ),
        ("logits", ["--vocab", "3000", "--positions", "40", "--only", "plain", "gathered"]),
        ("topk", ["--vocab", "3000", "--rows", "16"]),
    ],
)
def test_a_benchmark_prints_its_rows(name: str, options: list[str]) -> None:
    command = [sys.executable, "benchmarks/run.py", name, "--rounds", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    ours = [row for row in rows if row["method"].startswith("ours")]
    assert len(rows) > len(ours) > 1 and all(float(row["min_ms"]) >= 0 for row in rows)
    assert rows[0]["ratio"] == "1" and rows[0]["command"].startswith(f"python benchmarks/run.py {name}")
