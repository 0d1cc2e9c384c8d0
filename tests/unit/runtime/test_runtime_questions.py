"""Sources by name, rows of questions, and their comparison from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_replay import cli
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.runtime.questions import lines, question_id, questions_path, read_rows, take_rows
from megatron_replay.runtime.sources import each, named
from megatron_replay.stages.compare import differences


def test_sources_have_names() -> None:
    assert named("", "evaluate.text") == {}
    assert named("a/one.txt, b/two.txt", "evaluate.text") == {"one": Path("a/one.txt"), "two": Path("b/two.txt")}
    assert named({"wiki": "a=b/x.txt"}, "evaluate.text") == {"wiki": Path("a=b/x.txt")}
    with pytest.raises(ConfigError, match=r"both named 'x'; name them: evaluate\.text\.NAME=FILE"):
        named("a/x.txt,b/x.txt", "evaluate.text")


def test_one_source_stands_alone_and_several_by_name() -> None:
    def measure(path: Path) -> dict[str, Any]:
        return {"path": path.name}

    assert each("a/x.txt", "k", measure) == {"path": "x.txt"}
    assert each({"wiki": "a/x.txt"}, "k", measure) == {"wiki": {"path": "x.txt"}}
    assert list(each("a/x.txt,y.txt", "k", measure)) == ["x", "y"]


def test_rows_are_taken_out_of_the_result_and_named() -> None:
    result: dict[str, Any] = {
        "model": "m",
        "text": {"wiki": {"nll": 1.0, "rows": [{"question": "a", "nll": 1.0}, {"question": "a", "nll": 2.0}]}},
        "choice": {"rows": [{"question": "a", "correct": True}, {"question": "a", "correct": True, "measure": "norm"}]},
    }
    rows = take_rows(result)
    assert result == {"model": "m", "text": {"wiki": {"nll": 1.0}}, "choice": {}}
    keys = [(row["measure"], row["question"]) for row in rows]
    assert keys == [("text.wiki", "a"), ("text.wiki", "a#2"), ("choice", "a"), ("choice.norm", "a")]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    questions_path(path).write_text(lines(rows))
    return str(path)


def test_rows_come_back(tmp_path: Path) -> None:
    row = {"question": question_id("what?"), "measure": "m", "nll": 1.5, "prompt": "line\u2028separator"}
    path = Path(written(tmp_path / "run.v1.json", [row]))
    assert questions_path(path) == tmp_path / "run.v1.questions.jsonl"
    assert read_rows(questions_path(path)) == {("m", question_id("what?")): row}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]\n", ":1: a question is {measure, question, correct or nll}"),
        ('{"measure": "m"}\n', "KeyError: 'question'"),
        ('{"measure": "m", "question": "q", "correct": 1}\n', "correct is true or false"),
        ('{"measure": "m", "question": "q", "nll": "1"}\n', "nll a number"),
        ('{"measure": "m", "question": "q", "nll": 1, "tokens": 0}\n', "tokens=0 is no number above 0"),
        ('{"measure": "m", "question": "q"}\n' * 2, ":2: m asks question q twice"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.questions.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=r"x\.questions\.jsonl") as caught:
        read_rows(path)
    assert says in str(caught.value)


def rows(correct: str, shift: float) -> list[dict[str, Any]]:
    judged = [{"measure": "sql", "question": str(i), "correct": mark == "1"} for i, mark in enumerate(correct)]
    likely = [{"measure": "text", "question": str(i), "nll": (2 + shift) * i, "tokens": i} for i in range(1, 9)]
    return judged + likely


def test_two_results_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = written(tmp_path / "first.json", rows("000000011", 0))
    second = written(tmp_path / "second.json", rows("11111101", 0.25))
    assert cli.main(["compare", first, second, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sql"]["questions"] == 8 and found["sql"]["difference"] == pytest.approx(0.75)
    assert found["sql"]["p"] == pytest.approx(0.03125), "six questions that only the second has right"
    assert found["text"]["difference"] == pytest.approx(0.25) and found["text"]["high"] == pytest.approx(0.25)
    assert cli.main(["compare", first, second]) == 0
    shown = capsys.readouterr().out
    assert f"{second} - {first}" in shown and "1 of 17 questions of" in shown and "+0.75" in shown


def test_a_question_with_both_gives_two_lines() -> None:
    one = {("m", "q"): {"correct": True, "nll": 1.0}}
    assert list(differences(one, one)) == ["m", "m.nll"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, other = written(tmp_path / "a.json", rows("01", 0)), written(tmp_path / "b.json", [])
    for argv, says in [
        ([first], "needs two results that evaluate.output wrote, got 1"),
        ([first, other], "have no question in common"),
        ([first, str(tmp_path / "none.json")], "none.questions.jsonl: cannot be read"),
    ]:
        assert cli.main(["compare", *argv]) == 2
        assert says in capsys.readouterr().err
