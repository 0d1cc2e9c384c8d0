"""Tables: plain and aligned in a pipe, boxed on a terminal, nothing lost in either."""

from __future__ import annotations

import io
import math

import pytest

from megatron_replay.scoring.choice import Proportion
from megatron_replay.scoring.table import compare, flat, relative_change, show, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "True"),
        (12345, "12,345"),
        (19.7512, "19.75"),
        (1.25e-6, "1.25e-06"),
        (12345.678, "12,345.68"),
        (float("nan"), "nan"),
        ("base", "base"),
        (Proportion(0.5, 0.25, 0.75), "50.0% [25.0%, 75.0%]"),
    ],
)
def test_shown(value: object, text: str) -> None:
    assert shown(value) == text


def test_flat() -> None:
    assert flat({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}


def test_show_in_a_pipe() -> None:
    out = io.StringIO()
    show({"perplexity": 19.7512, "nl2sql": {"questions": 120}}, "After", file=out)
    assert out.getvalue() == ("After\nmetric            value\nperplexity        19.75\nnl2sql.questions    120\n")


def test_compare_in_a_pipe() -> None:
    out = io.StringIO()
    before = {"ppl": 20.0, "acc": Proportion(0.1, 0.05, 0.2), "n": 3, "only": 1, "name": "x"}
    compare(
        before, {"ppl": 22.0, "acc": Proportion(0.6, 0.5, 0.7), "n": 3, "name": "x"}, file=out, labels=("base", "tuned")
    )
    lines = [line.split("  ") for line in out.getvalue().splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells == [
        ["metric", "base", "tuned", "change"],
        ["ppl", "20", "22", "+2 (+10.0%)"],
        ["acc", "10.0% [5.0%, 20.0%]", "60.0% [50.0%, 70.0%]", "+50.0 points"],
        ["n", "3", "3", "="],
        ["only", "1", "-", "-"],
        ["name", "x", "x", "="],
    ]


def test_a_terminal_gets_a_box_and_names_are_no_markup() -> None:
    out = Terminal()
    show({"[bold]nll[/bold]": 1.5}, "On [screen]", file=out)
    assert "[bold]nll[/bold]" in out.getvalue() and "On [screen]" in out.getvalue() and "│" in out.getvalue()


def test_an_empty_result_is_a_table_without_rows() -> None:
    out = io.StringIO()
    show({}, "", file=out)
    assert out.getvalue() == "metric  value\n"


def test_relative_change() -> None:
    assert relative_change(20.0, 22.0) == pytest.approx(0.1)
    assert relative_change(-2.0, -1.0) == 0.5
    assert relative_change(0.0, 0.0) == 0
    assert relative_change(0.0, -1.0) == -math.inf
    assert math.isnan(relative_change(0.0, math.nan)) and math.isnan(relative_change(math.nan, 1.0))
