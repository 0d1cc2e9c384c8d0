"""Multiple-choice files as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_replay.errors import DataError
from megatron_replay.scoring.choice_layouts import Question, read_questions

GENERAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "general"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_mmlu_as_published_has_no_header(tmp_path: Path) -> None:
    path = written(tmp_path / "college_physics_test.csv", '"Which, of these?\nSay.",1,2,3,4,C\nq2,a,b,c,d,A\n')
    assert read_questions(path) == [
        Question("Which, of these?\nSay.", ("1", "2", "3", "4"), 2, "college physics"),
        Question("q2", ("a", "b", "c", "d"), 0, "college physics"),
    ]


def test_mmlu_with_a_header_and_in_a_folder(tmp_path: Path) -> None:
    written(tmp_path / "b_dev.csv", "question,choice0,choice1,answer\nq?, yes ,no,1\n")
    written(tmp_path / "a_dev.csv", '\ufeffquestion,choice0,choice1,answer\n"x, y",0,1,0\n')
    written(tmp_path / ".hidden.csv", "nonsense")
    found = read_questions(tmp_path)
    assert found == [Question("x, y", ("0", "1"), 0, "a"), Question("q?", ("yes", "no"), 1, "b")]


def test_the_development_questions_of_mmlu() -> None:
    if not GENERAL.is_dir():
        pytest.skip("the benchmarks beside the checkout are not there")
    found = read_questions(GENERAL / "mmlu_dev")
    assert len(found) == 285 and len({one.subject for one in found}) == 57
    assert all(len(one.choices) == 4 for one in found)


LAYOUTS: dict[str, tuple[dict[str, Any], Question]] = {
    "ours": ({"question": "q", "choices": ["a", "b"], "answer": 1}, Question("q", ("a", "b"), 1)),
    "mmlu json": (
        {"question": "q", "subject": "college_law", "choices": ["a", "b"], "answer": "B"},
        Question("q", ("a", "b"), 1, "college law"),
    ),
    "mmlu-pro": (
        {"question": "q", "options": list("vwxyz"), "answer": "E", "answer_index": 4, "category": "health"},
        Question("q", ("v", "w", "x", "y", "z"), 4, "health"),
    ),
    "teleqna": (
        {
            "question": "q [3GPP Release 17]",
            "option 1": "a",
            "option 2": "b",
            "option 10": "j",
            "option 3": "c",
            "answer": "option 10: j",
            "explanation": "because",
            "category": "Standards specifications",
        },
        Question("q [3GPP Release 17]", ("a", "b", "c", "j"), 3, "Standards specifications"),
    ),
}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "teleqna"])
def test_layouts(tmp_path: Path, name: str) -> None:
    keys, question = LAYOUTS[name]
    assert read_questions(written(tmp_path / "x_y.jsonl", json.dumps(keys) + "\n\n")) == [question]
    assert read_questions(written(tmp_path / "x_y.json", json.dumps([keys]))) == [question]


def test_teleqna_is_an_object_of_questions_in_a_txt(tmp_path: Path) -> None:
    keys = {name: text for name, text in LAYOUTS["teleqna"][0].items() if name != "option 10"} | {
        "answer": "option 3: c"
    }
    path = written(tmp_path / "TeleQnA.txt", json.dumps({"question 0": keys, "question 1": keys | {"option 4": "d"}}))
    first, second = read_questions(path)
    assert first.choices == ("a", "b", "c") and first.answer == 2 and second.choices == ("a", "b", "c", "d")
    broken = written(tmp_path / "broken.txt", json.dumps({"question 7": keys | {"answer": "option 4: d"}}))
    with pytest.raises(
        DataError, match=r"broken\.txt: question 7: answer 'option 4: d' is not the index of one of the 3"
    ):
        read_questions(broken)


def test_gpqa_is_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    head = (
        "Record ID,Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3,High-level domain"
    )
    rows = "".join(f"{i},q{i},right,wrong1,wrong2, wrong3 ,Physics\n" for i in range(60))
    found = read_questions(written(tmp_path / "gpqa_diamond.csv", f"{head}\n{rows}"))
    assert all(one.choices[one.answer] == "right" and one.subject == "Physics" for one in found)
    assert all(sorted(one.choices) == ["right", "wrong1", "wrong2", "wrong3"] for one in found)
    assert {one.answer for one in found} == {0, 1, 2, 3}
    assert found == read_questions(tmp_path / "gpqa_diamond.csv")


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    line = json.dumps({"question": "Which\u2028planet?", "choices": ["Mars", "\x85"], "answer": 0}, ensure_ascii=False)
    (found,) = read_questions(written(tmp_path / "choice.jsonl", line + "\r\n"))
    assert found.text == "Which\u2028planet?"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"question": "q"}', "a.jsonl:1: a multiple-choice question is {question, choices, answer}"),
        ("a.jsonl", '\n{"question": "q", "choices": ["a", "b"], "answer": 2}', "a.jsonl:2: answer 2 is not the index"),
        ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True is not the index"),
        ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": "C"}', "answer 'C' is not the index"),
        ("a.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": -1}', "answer -1 is not the index"),
        ("a.jsonl", '{"question": "q", "choices": ["a"], "answer": 0}', "a multiple-choice question is"),
        ("a.jsonl", "{", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected a question's keys and values, found list"),
        ("a.json", '{"a": 1}', "a.json: a: expected a question's keys and values, found int"),
        ("a.json", "1", "a.json: expected a list or an object of questions, found int"),
        ("a.csv", "question,choice0,choice1,answer\nq,a,b,c,1\n", "a.csv:2: 5 cells under 4 heads"),
        ("a.csv", "q,a,b,E\n", "a.csv:1: answer 'E' is not the index of one of the 2 choices, nor its letter"),
        ("a.json", "[]", "a.json: empty"),
        ("a.parquet", "", "a.parquet: questions are read from .csv, .json, .jsonl, .txt"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="in this folder; give the folder of the questions"):
        read_questions(tmp_path)
    with pytest.raises(DataError, match="cannot read: No such file"):
        read_questions(tmp_path / "no.json")
