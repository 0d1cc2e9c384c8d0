"""The picture of a run: the training loss, and each measure before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GREY, BLUE, INK = "#b8bdc6", "#2f6db5", "#30343b"
DOTS = 150
"""Dots an inch. The picture is 10 x 3 inches."""


@dataclass(frozen=True)
class Bars:
    """One measure before and after."""

    title: str
    before: float
    after: float
    form: str = "{:.2f}"
    """The format of a value above its bar."""
    better: str = "lower"


def draw(path: str | Path, losses: Sequence[float], measures: Sequence[Bars], *, title: str) -> Path:
    """Write a PNG and return its path.

    It has the loss of each step on the left, and beside it a pair of bars for each measure.
    """
    path = Path(path)
    with matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.edgecolor": GREY,
            "text.color": INK,
            "axes.labelcolor": INK,
            "font.family": "DejaVu Sans",
        }
    ):
        figure = Figure(figsize=(10, 3), layout="constrained")
        # drawn without a window system and without the state of the caller's plots
        canvas = FigureCanvasAgg(figure)
        left, *right = figure.subplots(1, 1 + len(measures), width_ratios=[2.2, *[1.0] * len(measures)])
        _loss(left, losses)
        for axes, bars in zip(right, measures, strict=True):
            _bars(axes, bars)
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_figure(path, format="png", dpi=DOTS, metadata={"Software": None})
    return path


def _loss(axes: Axes, losses: Sequence[float]) -> None:
    axes.plot(range(1, len(losses) + 1), losses, color=BLUE, linewidth=1.5, marker="." if len(losses) < 20 else None)
    axes.set_title("training loss over the stored sets", fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=GREY, alpha=0.35, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Axes, bars: Bars) -> None:
    values = [bars.before, bars.after]
    drawn = axes.bar(["before", "after"], values, color=[GREY, BLUE], width=0.62)
    axes.bar_label(drawn, [bars.form.format(value) for value in values], padding=2)
    axes.set_title(f"{bars.title}\n({bars.better} is better)", fontsize=9)
    axes.set_ylim(0, 1.18 * max(values) or 1)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
