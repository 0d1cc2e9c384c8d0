"""Progress of a long piece of work: a bar with rate and time left on a terminal, elsewhere a line every 10 %.

The lines are for log files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float], None]


@contextmanager
def progress(what: str, total: float, unit: str, *, shown: bool = True) -> Iterator[Advance]:
    """Yields a function to call with the amount of work done since its last call.

    shown: True on one rank, False on all others.
    """
    console = Console(stderr=True)
    if not shown or not total:
        yield lambda _: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(what, total=total, rate="")
            yield _measured(
                total, lambda amount, rate, _: bar.update(task, advance=amount, rate=f"{rate:,.0f} {unit}/s")
            )
    else:
        yield _measured(total, _lines(what, total, unit))


def _measured(total: float, show: Callable[[float, float, float], object]) -> Advance:
    """show(amount, rate, seconds left) at each advance."""
    began, done = time.perf_counter(), 0.0

    def advance(amount: float) -> None:
        nonlocal done
        done = min(done + amount, total)  # unequal amounts of replicas are shown as if they were equal
        rate = done / max(time.perf_counter() - began, 1e-9)
        show(amount, rate, (total - done) / max(rate, 1e-9))

    return advance


def _lines(what: str, total: float, unit: str) -> Callable[[float, float, float], None]:
    done = 0.0

    def show(amount: float, rate: float, left: float) -> None:
        nonlocal done
        before, done = done, min(done + amount, total)
        if int(done * 10 / total) > int(before * 10 / total):
            print(
                f"{what} {done / total:4.0%}  {done:,.0f} of {total:,.0f} {unit}, {rate:,.0f} a second, {left:.0f} s "
                "left",
                flush=True,
            )

    return show
