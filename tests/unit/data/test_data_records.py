from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_replay.data.records import Message, Record, read_records
from megatron_replay.errors import DataError


def write(path: Path, *rows: object) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def turns(record: Record) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.train) for m in record.messages]


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("prompt_completion", {"prompt": "p", "completion": "c"}, [("user", "p", True), ("assistant", "c", True)]),
        ("prompt_completion", {"prompt": "p", "response": "c"}, [("user", "p", True), ("assistant", "c", True)]),
        ("alpaca", {"instruction": "i", "input": "", "output": "o"}, [("user", "i", True), ("assistant", "o", True)]),
        (
            "alpaca",
            {"instruction": "i", "input": "x", "output": "o"},
            [("user", "i\nx", True), ("assistant", "o", True)],
        ),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "system": "s"},
            [("system", "s", True), ("user", "i", True), ("assistant", "o", True)],
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
            [("user", "h", True), ("assistant", "g", True)],
        ),
        (
            "messages",
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": "u"},
                    {"role": "assistant", "content": "a", "weight": 0},
                    {"role": "user", "content": "v"},
                    {"role": "assistant", "content": "b", "weight": 1},
                ]
            },
            [
                ("system", "s", True),
                ("user", "u", True),
                ("assistant", "a", False),
                ("user", "v", True),
                ("assistant", "b", True),
            ],
        ),
    ],
)
def test_formats(tmp_path: Path, name: str, row: dict[str, object], expected: list[tuple[str, str, bool]]) -> None:
    path = write(tmp_path / "d.jsonl", row | {"db_id": "concert"}, "", row)
    for format in ("auto", name):
        records = list(read_records(path, format))
        assert [turns(r) for r in records] == [expected, expected]
        assert [r.where for r in records] == [f"{path}:1", f"{path}:3"]
        assert records[0].extra == {"db_id": "concert"}
        assert not records[1].extra


def test_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\r\n")
    path = write(tmp_path / "b.jsonl", {"text": "three", "id": 3})
    first, second = read_records(f"{tmp_path / 'a.txt'}, {path}")
    assert (first.text, first.line, first.messages) == ("one\ntwo\r\n", 1, ())
    assert (second.text, second.extra) == ("three", {"id": 3})


def test_alpaca_with_a_text_column_is_alpaca(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"instruction": "i", "output": "o", "text": "i o"})
    assert turns(next(read_records(path))) == [("user", "i", True), ("assistant", "o", True)]


def test_each_file_decides_for_itself(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"})
    b = write(tmp_path / "b.jsonl", {"instruction": "i", "output": "o"})
    assert [r.messages[0].content for r in read_records(f"{a},{b}")] == ["p", "i"]


def test_further_keys_of_a_turn_go_to_the_template(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        {
            "messages": [
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "a", "reasoning_content": "r"},
            ]
        },
    )
    assert next(read_records(path)).messages[1] == Message("assistant", "a", True, {"reasoning_content": "r"})


def test_prompts_without_completions_are_for_generation_only(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"prompt": "p", "query": "select 1", "db_id": "d"})
    (record,) = read_records(path, targets=False)
    assert record.prompt == record.messages == (Message("user", "p"),)
    assert record.extra == {"query": "select 1", "db_id": "d"}
    with pytest.raises(DataError, match=r"d\.jsonl:1: no 'completion'"):
        list(read_records(path))


def test_prompt_is_what_comes_before_the_last_reply(tmp_path: Path) -> None:
    rows = [
        {"from": "human", "value": "1"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "3"},
        {"from": "gpt", "value": "4"},
    ]
    (record,) = read_records(write(tmp_path / "d.jsonl", {"conversations": rows}))
    assert [m.content for m in record.prompt] == ["1", "2", "3"]


GOOD = {"prompt": "p", "completion": "c"}
USER = {"role": "user", "content": "u"}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([GOOD, '{"prompt": "p", "completion" "c"}'], r":2: broken JSON at column 30: Expecting ':' delimiter"),
        (["[1]"], r":1: expected a JSON object"),
        (["[", "{}", "]"], r":1: a JSON array, not one record per line; convert it with: jq"),
        ([GOOD, "3"], r":2: expected a JSON object with keys, found a number"),
        ([GOOD, "[" * 100_000], r":2: JSON that cannot be read"),
        (["", "  "], r": empty; expected at least one record"),
        (
            [GOOD, {"instruction": "i", "output": "o"}],
            r":2: no 'prompt' key \(read as prompt_completion .*found 'instruction', 'output'",
        ),
        (
            [{"question": "q", "query": "s"}],
            r":1: the keys 'question', 'query' fit no format; expected one of messages",
        ),
        ([{}], r":1: the keys no keys fit no format"),
        (
            [{"prompt": "p", "messages": [USER]}],
            r":1: .* fit messages and prompt_completion; say which with data.format",
        ),
        ([GOOD, {"prompt": "p", "completion": " \n"}], r":2: 'completion' is empty, so there is nothing to train on"),
        ([{"prompt": "p"}], r":1: no 'completion'; add it"),
        ([{"prompt": 3, "completion": "c"}], r":1: 'prompt' must be a string, found a number \('3'\)"),
        ([{"prompt": None, "completion": "c"}], r":1: no 'prompt'"),
        ([{"prompt": "p", "completion": ["c"]}], r":1: 'completion' must be a string, found a list"),
        ([{"instruction": "i", "output": "o", "history": [["a", "b"]]}], r":1: alpaca's 'history' is not read"),
        ([{"messages": []}], r":1: 'messages' must be a list with at least one turn"),
        ([{"messages": "u"}], r":1: 'messages' must be a list"),
        ([{"messages": ["u"]}], r":1: messages\[0\] must be an object"),
        ([{"messages": [USER]}], r":1: no assistant turn to train on"),
        (
            [{"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]}],
            r":1: no assistant turn to train on",
        ),
        (
            [{"messages": [USER, {"role": "assistant", "content": "a", "weight": 0.5}]}],
            r"messages\[1\]: 'weight' is 0 .* or 1",
        ),
        (
            [{"messages": [USER, {"role": "bot", "content": "a"}]}],
            r":1: messages\[1\]: unknown role 'bot' in 'role'; known: system",
        ),
        ([{"messages": [USER, {"content": "a"}]}], r"messages\[1\]: unknown role None"),
        (
            [{"messages": [USER, {"role": "assistant", "content": None}]}],
            r"messages\[1\]: 'content' must be a string, found null",
        ),
        ([{"messages": [USER, {"role": "assistant", "content": ""}]}], r"messages\[1\]: empty assistant turn"),
        (
            [{"conversations": [{"from": "robot", "value": "a"}]}],
            r"conversations\[0\]: unknown role 'robot' in 'from'; known: human, gpt",
        ),
        (
            [{"system": "s", "messages": [{"role": "system", "content": "t"}, USER]}],
            r":1: both a 'system' key and a system turn",
        ),
        ([{"text": " "}], r":1: 'text' is empty"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path: Path, rows: list[object], expected: str) -> None:
    path = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(DataError, match=r"d\.jsonl" + ("" if expected.startswith(":") else ".*") + expected) as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("d.jsonl", b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n'), ("d.txt", b"a\n      \xe9t\xe9..\n")]
)
def test_other_encodings_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    column = content.splitlines()[1].index(b"\xe9") + 1
    with pytest.raises(DataError, match=rf"{name}:2: byte {column} of the line is not UTF-8 \(0xe9\)"):
        list(read_records(str(tmp_path / name)))


def test_missing_and_empty_files(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", GOOD)
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        next(read_records(f"{good},{tmp_path / 'none.jsonl'}"))  # before the first record of the good one
    with pytest.raises(DataError, match="no such file"):
        list(read_records(str(tmp_path)))
    with pytest.raises(DataError, match=r"no data file was named; set data\.path"):
        list(read_records(" ,"))
    for name, content in (("e.txt", ""), ("e.jsonl", ""), ("blank.txt", " \n"), ("blank.jsonl", "\n \n")):
        (tmp_path / name).write_text(content)
        for format in ("auto", "text"):
            with pytest.raises(DataError, match=rf"{name}.*: empty"):
                list(read_records(str(tmp_path / name), format))
    with pytest.raises(DataError, match="unknown data format 'sharegtp'"):
        list(read_records(good, "sharegtp"))


def test_a_given_format_must_fit_the_first_record_too(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", GOOD)
    with pytest.raises(DataError, match=r"d\.jsonl:1: no 'messages' key"):
        list(read_records(path, "messages"))


def test_spider_questions_are_refused_with_their_keys(shared_data: Path) -> None:
    path = shared_data / "nl2sql" / "spider_train.jsonl"
    with pytest.raises(DataError, match=r"spider_train\.jsonl:1: the keys .*'question'.* fit no format"):
        next(read_records(str(path)))
