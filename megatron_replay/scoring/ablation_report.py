"""The report of a comparison of recipes: tables, the Pareto front and its picture, and forgetting at matched gain."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_replay.ablation import BASE, Ablation
from megatron_replay.errors import DataError
from megatron_replay.scoring.front_picture import draw_fronts
from megatron_replay.scoring.fronts import Point, front, matched

Row = Mapping[str, Any]
CSV, REPORT, PICTURE = "rows.csv", "report.md", "front.png"


def write_report(ablation: Ablation, rows: Sequence[Row], folder: Path) -> str:
    """Write rows.csv, report.md and front.png into the folder; returns the report.

    Raises DataError for an unknown measure.
    """
    measures = sorted({name for row in rows for name in row["measures"]})
    for name in (ablation.gain, *ablation.forgetting):
        if any(name not in row["measures"] for row in rows):
            raise DataError(f"{name} is no measure of these runs; there are {', '.join(measures)}")
    _write_csv(folder / CSV, rows, measures)
    text = "\n".join([*_table(ablation, rows), "", *_matched(ablation, rows)])
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    lines = {recipe: averages for recipe in ablation.recipes if (averages := averaged(ablation, rows, recipe))}
    base = next(((row["measures"][ablation.gain], 0.0) for row in rows if row["recipe"] == BASE), None)
    change = f"mean change of {len(ablation.forgetting)} measures"
    draw_fronts(folder / PICTURE, lines, base, gain=ablation.gain, forgetting=change)
    return text


def averaged(ablation: Ablation, rows: Sequence[Row], recipe: str) -> list[Point]:
    """The points of a recipe in the order of its rates, each the mean over the seeds that are done."""
    by_rate: dict[float, list[Point]] = {}
    for row in rows:
        if row["recipe"] == recipe:
            by_rate.setdefault(float(row["rate"]), []).append(point(ablation, rows, row))
    return [
        (sum(x for x, _ in some) / len(some), sum(y for _, y in some) / len(some))
        for _, some in sorted(by_rate.items())
    ]


def forgotten(ablation: Ablation, rows: Sequence[Row], row: Row) -> float:
    """The mean over the measures of forgetting of what a run has more than the base; its own value without a base."""
    base: Mapping[str, float] = next((other["measures"] for other in rows if other["recipe"] == BASE), {})
    changes: list[float] = [row["measures"][name] - base.get(name, 0.0) for name in ablation.forgetting]
    return sum(changes) / len(changes)


def point(ablation: Ablation, rows: Sequence[Row], row: Row) -> Point:
    """(loss on the domain, forgetting) of a run."""
    return row["measures"][ablation.gain], forgotten(ablation, rows, row)


def points(ablation: Ablation, rows: Sequence[Row], recipe: str) -> dict[int, list[Point]]:
    """(loss on the domain, forgetting) of a recipe's runs by seed, in the order of their rates."""
    found: dict[int, list[Point]] = {}
    for row in sorted((row for row in rows if row["recipe"] == recipe), key=lambda row: float(row["rate"])):
        found.setdefault(row["seed"], []).append(point(ablation, rows, row))
    return found


def targets(ablation: Ablation, rows: Sequence[Row]) -> list[float]:
    """Losses on the domain at which recipes are compared: those that the first recipe reaches in every seed.

    They lie 80, 90, 95 and 100 % of the way from the base model's to the highest of the lowest of each seed.
    """
    first = next(iter(ablation.recipes))
    lowest = [min(loss for loss, _ in seed) for seed in points(ablation, rows, first).values()]
    base = [row["measures"][ablation.gain] for row in rows if row["recipe"] == BASE]
    if not lowest or not base:
        return []
    best = max(lowest)
    return [base[0] + share * (best - base[0]) for share in (0.8, 0.9, 0.95, 1.0)]


def _write_csv(path: Path, rows: Sequence[Row], measures: Sequence[str]) -> None:
    costs = sorted({name for row in rows for name in row["costs"]})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["recipe", "rate", "seed", *costs, *measures])
        for row in rows:
            numbers = [row["costs"].get(name, "") for name in costs]
            numbers += [row["measures"].get(name, "") for name in measures]
            writer.writerow([row["recipe"], f"{row['rate']:g}", row["seed"], *map(_short, numbers)])


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(ablation: Ablation, rows: Sequence[Row]) -> list[str]:
    names = [ablation.gain, *ablation.forgetting]
    marked = set(front([point(ablation, rows, row) for row in rows]))
    head = ["recipe", "rate", "seed", *names, "forgotten", "front"]
    lines = ["## All runs", "", _line(head), _line(["---"] * len(head))]
    for number, row in enumerate(rows):
        numbers = [f"{row['measures'][name]:.4f}" for name in names]
        cells = [row["recipe"], f"{row['rate']:g}", str(row["seed"]), *numbers]
        lines.append(_line([*cells, f"{forgotten(ablation, rows, row):+.4f}", "*" if number in marked else ""]))
    return lines


def _matched(ablation: Ablation, rows: Sequence[Row]) -> list[str]:
    domain = targets(ablation, rows)
    if not domain:
        return []
    recipes = list(ablation.recipes)
    head = ["recipe", *(f"at {loss:.3f}" for loss in domain), "lowest"]
    lines = [
        f"## Forgetting at equal {ablation.gain}",
        "",
        f"The mean change of {', '.join(ablation.forgetting)} from the base, interpolated over rates; +- half of the "
        "95 % interval over seeds.",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for recipe in recipes:
        by_seed = points(ablation, rows, recipe)
        if not by_seed:
            continue
        cells = [_cell(matched(by_seed, loss)) for loss in domain]
        lowest = min(loss for seed in by_seed.values() for loss, _ in seed)
        lines.append(_line([recipe, *cells, f"{lowest:.3f}"]))
    return lines


def _cell(found: Any) -> str:
    if found is None:
        return "-"
    return f"{found.mean:+.4f}" + (f" +- {found.half:.4f} ({found.seeds})" if found.seeds > 1 else "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
