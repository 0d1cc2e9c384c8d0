"""The log of an evaluation's questions: written whole, read back by question, never a stale one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_replay.errors import DataError
from megatron_replay.runtime.question_log import log_path, question_uid, read_questions, write_questions

LINES = [{"index": i, "uid": f"u{i}", "verdict": "right", "reason": "line\u2028mark"} for i in range(2)]


def test_what_was_written_is_read_by_question(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "e.json"
    write_questions(output, {"nl2sql": LINES, "choice": LINES[:1]})
    assert log_path(output) == tmp_path / "deep" / "e.json.questions.jsonl"
    found = read_questions(log_path(output))
    assert list(found) == [("nl2sql", 0, "u0"), ("nl2sql", 1, "u1"), ("choice", 0, "u0")]
    assert found["nl2sql", 1, "u1"] == {"measure": "nl2sql", **LINES[1]}
    assert [path.name for path in output.parent.iterdir()] == ["e.json.questions.jsonl"]


def test_an_evaluation_without_questions_leaves_no_earlier_ones(tmp_path: Path) -> None:
    write_questions(tmp_path / "e.json", {"nl2sql": LINES})
    write_questions(tmp_path / "e.json", {})
    write_questions(tmp_path / "e.json", {"nl2sql": []})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]\n", '{"measure": "nl2sql"}\n', '{"measure": "a", "index": 0, "uid": []}\n'])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match="line 1 is none of a question log"):
        read_questions(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_uids() -> None:
    assert question_uid({"uid": "a", "id": 3}, "text") == "a" and question_uid({"id": 3}, "text") == "3"
    assert question_uid({}, "a", "b") == question_uid({"uid": None}, "a", "b") != question_uid({}, "ab")
