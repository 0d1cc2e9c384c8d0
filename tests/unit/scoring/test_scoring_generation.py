"""Answers taken out of what a model wrote: GSM8K, MATH, BIG-Bench Hard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_replay.errors import DataError
from megatron_replay.scoring.generation import (
    bbh_answer,
    finished,
    gsm8k_flexible,
    gsm8k_strict,
    math_answer,
    one_task,
    problem_context,
    read_problems,
    verdicts,
)
from megatron_replay.scoring.latex import boxed, normalised
from megatron_replay.scoring.shots import Asked

GENERAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "general"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72", "72"),
        ("#### -1,234.5 and then 7", "-1234.5", "7"),
        ("She pays $1,000.", None, "1000"),
        ("#### 5. Question", "5", "5"),
        ("no number at all", None, None),
        ("1 apple, 2 pears\n#### 3\n\n#### 4", "3", "4"),
        ("the answer is -7", None, "-7"),
    ],
)
def test_gsm8k(text: str, strict: str | None, flexible: str | None) -> None:
    assert gsm8k_strict(text) == strict and gsm8k_flexible(text) == flexible


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{x^{2}+{y}}", "x^{2}+{y}"),
        (r"so $\boxed 5$ it is", "5"),
        (r"\fbox{7}", "7"),
        ("Final Answer: The final answer is $3$. I hope it is correct.", "3"),
        ("The final answer is: 12.", "12"),
        (r"\boxed{unfinished", None),
        ("nothing", None),
    ],
)
def test_math(text: str, answer: str | None) -> None:
    assert math_answer(text) == answer


def test_the_last_complete_box_counts() -> None:
    assert boxed(r"\boxed{1} and \boxed{2") == "1"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("1/2", r"\frac{1}{2}"),
        ("-3/4", r"-\frac{3}{4}"),
        (r"\tfrac{a}2", r"\frac{a}{2}"),
        (r"\frac1{72}", r"\frac{1}{72}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        ("10,000", "10000"),
        ("1{,}000", "1000"),
        (r"\$18.00", "18"),
        ("50\\%", "50"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"5\text{ cm}", "5"),
        (r"12\text{ cm}^2", "12"),
        (r"\text{Evelyn}", "Evelyn"),
        (".5", "0.5"),
        ("x = 5", "5"),
        ("3.0", "3"),
        (r"2\!\,x", "2x"),
    ],
)
def test_answers_written_differently_are_the_same(one: str, other: str) -> None:
    assert normalised(one) == normalised(other) == other


@pytest.mark.parametrize(
    ("one", "other"), [("1,2", "12"), (r"\leftarrow", "arrow"), ("10.5", "10"), ("x+1", "x-1"), ("0,100", "0100")]
)
def test_other_answers_stay_apart(one: str, other: str) -> None:
    assert normalised(one) != normalised(other)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" (B)\n\nQ: next", "(B)"),
        ("Let's think. 1 + 1 = 2.\nSo the answer is (A).\n", "(A)"),
        ("the answer is wrong? No, the answer is: True.", "True"),
        ("False.", "False"),
        ("So the answer is ] ) >.\nand more", "] ) >"),
        ("  \n", None),
    ],
)
def test_bbh(text: str, answer: str | None) -> None:
    assert bbh_answer(text) == answer


def lines(path: Path, *objects: object) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


def test_prompts_and_verdicts(tmp_path: Path) -> None:
    first, second = read_problems(
        lines(
            tmp_path / "gsm8k.jsonl",
            {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
            {"question": "500 + 500?", "answer": "#### 1,000"},
        )
    )
    assert problem_context(Asked(second, [first])) == (
        "Question: 1 + 1?\nAnswer: It is 2.\n#### 2\n\nQuestion: 500 + 500?\nAnswer:"
    )
    assert verdicts(second, "so 1000") == {"strict": False, "flexible": True}
    assert verdicts(second, "#### 1000") == {"strict": True, "flexible": True}
    assert finished("2\n\nQuestion: more\nQuestion:", first.task.stop) == "2\n\n"
    assert finished("a b c", "c", "b") == "a " and finished("a b c") == "a b c"
    (problem,) = read_problems(
        lines(tmp_path / "math.jsonl", {"problem": "p {1}", "solution": r"so $\boxed{\dfrac12}$"})
    )
    assert problem_context(Asked(problem, [])) == "Problem:\np {1}\n\nSolution:"
    assert verdicts(problem, "Final Answer: The final answer is $1/2$. I hope it is correct.") == {"exact": True}


def test_bbh_is_a_folder_of_tasks(tmp_path: Path) -> None:
    for name in ("one_task", "another"):
        (tmp_path / f"{name}.json").write_text(
            json.dumps({"canary": "c", "examples": [{"input": "q", "target": "(A)"}, {"input": "r", "target": "(B)"}]})
        )
    found = read_problems(tmp_path)
    assert [one.subject for one in found] == ["another", "another", "one task", "one task"]
    assert problem_context(Asked(found[1], [found[0]])) == "Q: q\nA: (A)\n\nQ: r\nA:"
    assert verdicts(found[1], " (B)") == {"exact": True}


def test_the_files_beside_the_checkout() -> None:
    if not GENERAL.is_dir():
        pytest.skip("the benchmarks beside the checkout are not there")
    problems = read_problems(GENERAL / "gsm8k_train.jsonl")
    assert len(problems) == 7473
    assert all(verdicts(one, one.solution) == {"strict": True, "flexible": True} for one in problems)
    tasks = read_problems(GENERAL / "bbh")
    assert len({one.subject for one in tasks}) == 11 and all(verdicts(one, one.solution)["exact"] for one in tasks)


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:1: no final answer found in 'no box'"):
        read_problems(lines(tmp_path / "x.jsonl", {"problem": "p", "solution": "no box"}))
    mixed = lines(tmp_path / "y.jsonl", {"input": "q", "target": "a"}, {"question": "q", "answer": "#### 5"})
    with pytest.raises(DataError, match=r"y\.jsonl: questions of bbh and gsm8k"):
        one_task(read_problems(mixed), mixed)
