"""The picture of a comparison: each recipe a line through its learning rates, gain against forgetting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_replay.scoring.fronts import Point

INK, GREY = "#30343b", "#b8bdc6"
COLOURS = ("#2f6db5", "#c4572a", "#3a8f5c", "#8a5aa8", "#a58a1e", "#c05a86", "#4d8fa3", "#7a6a5a", "#5a6f2f", "#9a3b3b")
MARKS = "os^Dv<>Ph*X"
DOTS = 150
"""Dots an inch."""


def draw_fronts(
    path: Path, recipes: Mapping[str, Sequence[Point]], base: Point | None, *, gain: str, forgetting: str
) -> Path:
    """Write a PNG and return its path.

    recipes: the points of each recipe in the order of its rates, means over its seeds. base: the untrained model.
    """
    with matplotlib.rc_context(
        {"font.size": 9, "axes.edgecolor": GREY, "text.color": INK, "font.family": "DejaVu Sans"}
    ):
        figure = Figure(figsize=(8, 5), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots()
        for number, (name, points) in enumerate(recipes.items()):
            _line(axes, name, points, number)
        if base is not None:
            axes.axhline(base[1], color=GREY, linewidth=1, zorder=0)
            axes.annotate("base model", (0.99, base[1]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        axes.invert_xaxis()
        axes.set_xlabel(f"{gain}: what is learnt grows to the right")
        axes.set_ylabel(f"{forgetting}: lower forgets less")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.print_figure(path, format="png", dpi=DOTS, metadata={"Software": None})
    return path


def _line(axes: Axes, name: str, points: Sequence[Point], number: int) -> None:
    x, y = zip(*points, strict=True)
    axes.plot(
        x,
        y,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKS[number % len(MARKS)],
        linestyle="-" if number < len(COLOURS) else "--",
        linewidth=1.4,
        markersize=5,
        label=name,
    )
