"""Results on the terminal: boxed tables there, aligned plain text in a file or a pipe."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_replay.scoring.choice import Proportion


def show(results: Mapping[str, Any], title: str, *, file: TextIO | None = None) -> None:
    """Print metric and value; nested results get dotted names. `file` defaults to stdout."""
    rows = [(name, shown(value)) for name, value in flat(results).items()]
    _print(title, ("metric", "value"), rows, file or sys.stdout)


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    title: str = "",
    *,
    labels: tuple[str, str] = ("before", "after"),
    file: TextIO | None = None,
) -> None:
    """Print metric, both values, and for numbers the difference and the relative change.

    A metric that only one side has gets a dash.
    """
    left, right = flat(before), flat(after)
    rows = [
        (name, shown(left.get(name)), shown(right.get(name)), _difference(left.get(name), right.get(name)))
        for name in {**left, **right}
    ]
    _print(title, ("metric", *labels, "change"), rows, file or sys.stdout)


def show_rows(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, file: TextIO | None = None) -> None:
    """Print cells that are texts already, under their heads."""
    _print(title, heads, rows, file or sys.stdout)


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    level: dict[str, Any] = {}
    for name, value in results.items():
        level.update(flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value})
    return level


def shown(value: Any) -> str:
    """A value as the table shows it.

    Numbers have four significant digits and separated thousands. A proportion is in percent with its interval. None is
    a dash.
    """
    if value is None:
        return "-"
    if isinstance(value, Proportion):
        return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, Proportion) and isinstance(after, Proportion):
        return f"{100 * (after.value - before.value):+.1f} points"
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (before, after))
    if not numbers:
        return "-" if None in (before, after) or before != after else "="
    if before == after:
        return "="
    percent = f" ({relative_change(before, after):+.1%})" if before else ""
    return f"{after - before:+.4g}{percent}"


def relative_change(before: float, after: float) -> float:
    """(after - before) / |before|: +0.1 is ten percent more than before.

    From zero it is 0 (still zero) or an infinity; NaN stays NaN.
    """
    if before == 0:
        return 0.0 if after == 0 else math.nan if math.isnan(after) else math.copysign(math.inf, after)
    return (after - before) / abs(before)


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], file: TextIO) -> None:
    console = Console(file=file)
    if not console.is_terminal:
        file.write(_plain(title, heads, rows))
        return
    table = Table(title=Text(title) if title else None)
    for column, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if column else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a name with [brackets] is no markup
    console.print(table)


def _plain(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [title] if title else []
    for row in (heads, *rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
