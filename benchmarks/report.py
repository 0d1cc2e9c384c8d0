"""Draw the pictures of docs/reports/performance.md and write its tables, from benchmarks/results.

    python benchmarks/report.py

Each table stands between `<!-- NAME -->` and `<!-- end -->`, and is written anew.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
Rows = list[dict[str, str]]


def rows_of(name: str) -> Rows:
    """The rows of the newest run of each command."""
    with (HERE / "results" / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    newest = {row["command"]: (row["date"], row["commit"]) for row in rows}
    return [row for row in rows if newest[row["command"]] == (row["date"], row["commit"])]


def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def thousands(text: str) -> str:
    return f"{int(text):,}"


def all_methods() -> Rows:
    """The rows of the loss of runs that compare all methods."""
    return [row for row in rows_of("loss") if "--only" not in row["command"]]


def loss() -> str:
    return markdown(
        ["V, H", "method", "ms", "x ours", "temporary MB", "gradient MB"],
        [
            [
                f"{thousands(r['V'])}, {thousands(r['H'])}",
                r["method"],
                r["min_ms"],
                r["ratio"],
                r["temporary_mb"],
                r["gradient_mb"],
            ]
            for r in all_methods()
        ],
    )


def targets() -> str:
    """One line a run: soft targets beside the paper's loss."""
    soft = [row for row in rows_of("loss") if row["method"].startswith("soft") and "--only" in row["command"]]
    hard = {row["command"]: row["min_ms"] for row in rows_of("loss") if row["ratio"] == "1"}
    return markdown(
        ["V, H", "dtype", "hard, ms", "soft, ms", "soft / hard"],
        [
            [
                f"{thousands(r['V'])}, {thousands(r['H'])}",
                "bfloat16" if "bfloat16" in r["command"] else "float32",
                hard[r["command"]],
                r["min_ms"],
                r["ratio"],
            ]
            for r in soft
        ],
    )


def logits() -> str:
    return markdown(
        ["V", "threads", "method", "ms", "x ours"],
        [[thousands(r["V"]), r["threads"], r["method"], r["min_ms"], r["ratio"]] for r in rows_of("logits")],
    )


def topk() -> str:
    return markdown(
        ["V", "method", "ms a row", "x ours"],
        [[thousands(r["V"]), r["method"], r["min_ms_a_row"], r["ratio"]] for r in rows_of("topk")],
    )


def step() -> str:
    return markdown(
        ["ranks (tensor)", "rows of 256 tokens", "loss", "s", "full / it", "median of rounds"],
        [
            [f"{r['ranks']} ({r['tensor']})", r["rows"], r["loss"], r["min_s"], r["ratio"], r["median_ratio"]]
            for r in rows_of("step")
        ],
    )  # fmt: skip


def prefix() -> str:
    return markdown(
        ["loss", "figure", "value", "unit"],
        [[r["loss"], r["metric"], r["value"], r["unit"]] for r in rows_of("prefix")],
    )


def scale() -> str:
    """One line a point: the restricted loss beside the full one."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for r in rows_of("scale"):
        found.setdefault((r["axis"], r[r["axis"]]), {})[r["loss"]] = r["min_ms"]
    kinds = list(next(iter(found.values())))
    lines = [[axis, thousands(value), *(some[kind] for kind in kinds)] for (axis, value), some in found.items()]
    return markdown(["axis", "value", *(f"{kind}, ms" for kind in kinds)], lines)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (loss, targets, logits, topk, step, prefix, scale)
}


def filled(text: str) -> str:
    """A page with its tables written anew."""

    def anew(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{TABLES[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", anew, text, flags=re.DOTALL)


def bars(axes: Any, rows: Rows) -> None:
    """Milliseconds of each method, on a logarithmic scale; ours in another colour."""
    names, times = [row["method"] for row in rows][::-1], [float(row["min_ms"]) for row in rows][::-1]
    axes.barh(names, times, color=["tab:orange" if name.startswith("ours") else "tab:blue" for name in names])
    axes.set(xscale="log", xlabel="ms, forward and backward")


def draw_loss() -> None:
    rows = all_methods()
    sizes = sorted({(int(row["V"]), int(row["H"])) for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(sizes), figsize=(7 * len(sizes), 4.5), layout="constrained", squeeze=False)
    for (vocab, width), one in zip(sizes, axes[0], strict=True):
        mine = [row for row in rows if (int(row["V"]), int(row["H"])) == (vocab, width)]
        bars(one, mine)
        one.set_title(f"V = {vocab:,}, H = {width:,}, T = {int(mine[0]['T']):,}, threads: {mine[0]['threads']}")
    figure.savefig(DOCS / "img" / "loss.png", dpi=110)


def draw_scale() -> None:
    rows = rows_of("scale")
    names = list(dict.fromkeys(row["axis"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(3.2 * len(names), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    for name, one in zip(names, axes[0], strict=True):
        for kind in dict.fromkeys(row["loss"] for row in rows):
            points = sorted(
                (int(row[name]), float(row["min_ms"])) for row in rows if row["axis"] == name and row["loss"] == kind
            )
            one.plot(*zip(*points, strict=True), marker="o", label=kind)
        one.set(xscale="log", yscale="log", xlabel=name)
        values = sorted({int(row[name]) for row in rows if row["axis"] == name})
        one.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        one.minorticks_off()
    axes[0][0].set_ylabel("ms, forward and backward")
    axes[0][0].legend()
    figure.savefig(DOCS / "img" / "scale.png", dpi=110)


if __name__ == "__main__":
    page = DOCS / "reports" / "performance.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw_loss()
    draw_scale()
