"""How far a long piece of work is: a bar with rate and time left on a terminal; a line every 10 % elsewhere, so that
log files tell too."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[float], None]


@contextmanager
def progress(what: str, total: float, unit: str, *, shown: bool = True) -> Iterator[Advance]:
    """Call what is yielded with the amount of work done since the last call. shown: false on all ranks but one."""
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


def _measured(total: float, tell: Callable[[float, float, float], object]) -> Advance:
    """tell(amount, rate, seconds left) at each advance."""
    began, done = time.perf_counter(), 0.0

    def advance(amount: float) -> None:
        nonlocal done
        done = min(done + amount, total)  # the amounts of replicas that are not equal are told as if they were
        rate = done / max(time.perf_counter() - began, 1e-9)
        tell(amount, rate, (total - done) / max(rate, 1e-9))

    return advance


def _lines(what: str, total: float, unit: str) -> Callable[[float, float, float], None]:
    done = 0.0

    def tell(amount: float, rate: float, left: float) -> None:
        nonlocal done
        before, done = done, min(done + amount, total)
        if int(done * 10 / total) > int(before * 10 / total):
            print(
                f"{what} {done / total:4.0%}  {done:,.0f} of {total:,.0f} {unit}, {rate:,.0f} a second, {left:.0f} s "
                "left",
                flush=True,
            )

    return tell
