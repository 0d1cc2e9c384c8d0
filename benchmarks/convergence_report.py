"""Draw the figure and fill the tables of docs/reports/convergence.md, from the study's csv alone; train nothing.

    python benchmarks/convergence_report.py benchmarks/results/convergence.csv --figure docs/img/convergence.png \\
        --page docs/reports/convergence.md

Numbers are mean ± standard deviation over the seeds. A table of the page stands between `<!-- table NAME -->` and `<!--
end -->`.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

Row = dict[str, str]

SWEPT = ("adamw", "adamw-tuned", "adamw-no-momentum", "adam_atan2", "moclip-45", "moclip-45-restart", "tam-paper")
STYLES = {  # Okabe and Ito's colours, and a marker and a dash each for those who see none
    "adamw": ("#000000", "o", "-"),
    "adamw-tuned": ("#D55E00", "s", "--"),
    "adamw-no-momentum": ("#CC79A7", "P", (0, (1, 1))),
    "adam_atan2": ("#56B4E9", "^", ":"),
    "moclip-45": ("#0072B2", "D", "-."),
    "moclip-45-restart": ("#009E73", "v", (0, (5, 1, 1, 1, 1, 1))),
    "tam-paper": ("#E69F00", "X", (0, (6, 2))),
}
HEADS = {
    "domain_loss": "domain loss",
    "retention_loss": "retention loss",
    "distance": "distance",
    "probe_sd": "probe sd",
    "train_sd": "training sd",
    "steps_to_target": "steps to target",
    "angle_mean": "angle, mean",
    "angle_p95": "angle, 95 %",
    "clipped": "clipped",
}
DIGITS = {
    "domain_loss": 2,
    "retention_loss": 2,
    "distance": 3,
    "probe_sd": 4,
    "train_sd": 3,
    "steps_to_target": 0,
    "angle_mean": 0,
}
SCOPES, OBTUSE, ANGLES = ("global", "layer", "tensor"), ("signed", "restart", "project"), (30, 45, 60)


def read_rows(path: Path) -> list[Row]:
    """The runs of a results file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def chosen(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """The rows whose columns have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values(rows: Sequence[Row], column: str) -> list[float]:
    """A column's numbers; runs that have none are left out."""
    return [float(row[column]) for row in rows if row[column]]


def spread(found: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return float(np.std(found, ddof=min(1, len(found) - 1)))


def cell(rows: Sequence[Row], column: str) -> str:
    """Mean ± sd over runs; of steps to the target, how many runs got there unless all did."""
    found = values(rows, column)
    if not found:
        return "never" if column == "steps_to_target" and rows else ""
    if column == "clipped":
        return f"{100 * np.mean(found):.0f} %"
    digits = DIGITS.get(column, 0)
    text = f"{np.mean(found):.{digits}f}"
    if column not in ("angle_mean", "angle_p95") and len(found) > 1:
        text += f" ± {spread(found):.{digits}f}"
    return text + (f" ({len(found)} of {len(rows)})" if column == "steps_to_target" and len(found) < len(rows) else "")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def in_order(rows: Sequence[Row], column: str) -> list[str]:
    """The values of a column, each once, as they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def methods_table(rows: Sequence[Row], setting: str) -> str:
    """Every method at the rate of a setting, but for the grid of MoClip's own options, of which scope and obtuse stay
    at the default."""
    here = sorted(
        chosen(rows, setting=setting),
        key=lambda row: SWEPT.index(row["method"]) if row["method"] in SWEPT else len(SWEPT),
    )
    grid = re.compile(r"moclip-(90|\d+-(layer|tensor|restart|project).*)")
    names = [name for name in in_order(here, "method") if name in SWEPT or not grid.fullmatch(name)]
    lines = [[f"`{name}`", *(cell(chosen(here, method=name), column) for column in HEADS)] for name in names]
    return table(["", *HEADS.values()], lines)


def grid_table(rows: Sequence[Row]) -> str:
    """MoClip's angle x scope x obtuse at both rates."""
    lines = []
    shown = ("domain_loss", "retention_loss", "distance", "probe_sd")
    for scope in SCOPES:
        for obtuse in OBTUSE:
            for angle in ANGLES:
                name = f"moclip-{angle}" + "".join(
                    f"-{part}" for part in (scope, obtuse) if part not in ("global", "signed")
                )
                runs = [chosen(rows, setting=setting, method=name) for setting in ("good", "high")]
                lines.append([scope, obtuse, f"{angle}°", *(cell(r, column) for column in shown for r in runs)])
    at = [in_order(chosen(rows, setting=setting), "lr")[0] for setting in ("good", "high")]
    return table(["scope", "obtuse", "angle", *(f"{HEADS[column]}, {lr}" for column in shown for lr in at)], lines)


def swept(rows: Sequence[Row]) -> list[Row]:
    """The runs of the methods compared over the learning rate."""
    return [row for row in rows if row["setting"] != "batch" and row["method"] in SWEPT]


def rates(rows: Sequence[Row]) -> list[str]:
    """The learning rates of the sweep, ascending."""
    return sorted(in_order(swept(rows), "lr"), key=float)


def sweep_table(rows: Sequence[Row]) -> str:
    """Domain loss and retention loss over the learning rate."""
    lines = [
        [f"`{name}`", HEADS[column], *(cell(chosen(swept(rows), method=name, lr=lr), column) for lr in rates(rows))]
        for column in ("domain_loss", "retention_loss", "distance", "probe_sd")
        for name in SWEPT
    ]
    return table(["", "", *rates(rows)], lines)


def batch_table(rows: Sequence[Row]) -> str:
    """The rate that suits AdamW, with the usual and with a larger batch."""
    lines = []
    for setting in ("good", "batch"):
        for name in SWEPT:
            runs = chosen(rows, setting=setting, method=name)
            batch = in_order(runs, "batch")
            lines.append(
                [f"`{name}`", *batch, *(cell(runs, column) for column in HEADS if column != "steps_to_target")]
            )
    return table(["", "batch", *(head for column, head in HEADS.items() if column != "steps_to_target")], lines)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table of the page by its name there."""
    return {
        "good": methods_table(rows, "good"),
        "high": methods_table(rows, "high"),
        "sweep": sweep_table(rows),
        "grid": grid_table(rows),
        "batch": batch_table(rows),
    }


def filled(page: str, made: dict[str, str]) -> str:
    """The page with its tables replaced; one it names and we do not make is a KeyError."""
    pattern = re.compile(r"(<!-- table ([a-z ]+) -->\n).*?(\n<!-- end -->)", flags=re.DOTALL)
    return pattern.sub(lambda found: found[1] + made[found[2]] + found[3], page)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Domain loss over the rate, forgetting against learning, and the probe's loss at both rates."""
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for name in SWEPT:
        colour, marker, dash = STYLES[name]
        look = {"color": colour, "marker": marker, "linestyle": dash, "label": name, "markersize": 5, "linewidth": 1.5}
        runs = [r for r in (chosen(swept(rows), method=name, lr=lr) for lr in rates(rows)) if r]
        learnt, kept = ([values(r, column) for r in runs] for column in ("domain_loss", "retention_loss"))
        means = [np.mean(v) for v in learnt]
        axes[0, 0].errorbar([float(r[0]["lr"]) for r in runs], means, [spread(v) for v in learnt], capsize=3, **look)
        axes[0, 1].plot([np.mean(v) for v in kept], means, **look)
        for axis, setting in zip(axes[1], ("good", "high"), strict=True):
            probe = np.array(
                [[float(v) for v in row["probe"].split()] for row in chosen(rows, setting=setting, method=name)]
            )
            steps = np.linspace(0, int(rows[0]["steps"]), probe.shape[1])
            axis.plot(steps, probe.mean(0), color=colour, linestyle=dash, label=name, linewidth=1.5)
            axis.fill_between(steps, probe.min(0), probe.max(0), color=colour, alpha=0.12, linewidth=0)
    axes[0, 0].set(
        xscale="log", xlabel="learning rate", ylabel="domain loss at the end", title="Learning, over the rate"
    )
    axes[0, 1].set(
        xlabel="retention loss at the end",
        ylabel="domain loss at the end",
        title="Learning against forgetting, a point a rate",
    )
    for axis, setting in zip(axes[1], ("good", "high"), strict=True):
        (lr,) = in_order(chosen(rows, setting=setting), "lr")
        axis.set(xlabel="step", ylabel="probe loss", title=f"Fixed probe batch, lr {lr}")
    axes[1, 1].sharey(axes[1, 0])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--page", type=Path, help="its tables are filled in; without it they are printed")
    args = parser.parse_args()
    rows = read_rows(args.results)
    if args.figure:
        draw(rows, args.figure)
    if args.page:
        args.page.write_text(filled(args.page.read_text(encoding="utf-8"), tables(rows)), encoding="utf-8")
    else:
        print(*(f"{name}\n{text}\n" for name, text in tables(rows).items()), sep="\n")


if __name__ == "__main__":
    main()
