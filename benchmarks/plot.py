"""The pictures of docs/performance.md from the tables in benchmarks/results.

python benchmarks/plot.py
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "img"
Rows = list[dict[str, str]]


def table(name: str) -> Rows:
    """The rows of the last run of each command."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row["command"]: row["commit"] for row in rows}
    return [row for row in rows if last[row["command"]] == row["commit"]]


def bars(axes: Any, rows: Rows, title: str) -> None:
    """Milliseconds of each method, on a logarithmic scale; ours in another colour."""
    names = [row["method"] for row in rows][::-1]
    times = [float(row["min_ms"]) for row in rows][::-1]
    axes.barh(names, times, color=["tab:orange" if name.startswith("ours") else "tab:blue" for name in names])
    axes.set_xscale("log")
    axes.set_xlabel("ms, forward and backward")
    axes.set_title(title)


def loss() -> None:
    rows = table("loss")
    sizes = sorted({(int(row["V"]), int(row["H"])) for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(sizes), figsize=(7 * len(sizes), 4.5), layout="constrained", squeeze=False)
    for (vocab, width), one in zip(sizes, axes[0], strict=True):
        mine = [row for row in rows if (int(row["V"]), int(row["H"])) == (vocab, width)]
        bars(one, mine, f"V = {vocab:,}, H = {width:,}, T = {int(mine[0]['T']):,}, {mine[0]['threads']} thread")
    figure.savefig(IMAGES / "loss.png", dpi=110)


def scale() -> None:
    rows = table("scale")
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = plt.subplots(1, len(axes_names), figsize=(3.2 * len(axes_names), 3.2), layout="constrained", sharey=True, squeeze=False)
    for name, one in zip(axes_names, axes[0], strict=True):
        for kind in dict.fromkeys(row["loss"] for row in rows):
            points = sorted((int(row[name]), float(row["min_ms"])) for row in rows if row["axis"] == name and row["loss"] == kind)
            one.plot(*zip(*points, strict=True), marker="o", label=kind)
        one.set(xscale="log", yscale="log", xlabel=name)
    axes[0][0].set_ylabel("ms, forward and backward")
    axes[0][0].legend()
    figure.savefig(IMAGES / "scale.png", dpi=110)


if __name__ == "__main__":
    loss()
    scale()
