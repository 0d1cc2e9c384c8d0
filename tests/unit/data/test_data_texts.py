"""The file of a model's own texts: what is written is read, a torn end is cut, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_replay.data.texts import NAME, PARTIAL, Text, TextFile, joined, load_texts
from megatron_replay.errors import DataError

ABOUT = {"model": "m" * 64, "seed": 1}
TEXTS = [
    Text(0, (5, 1, 2, 3), ((1, 4),), "five: one two three"),
    Text(1, (5, 7), ((1, 2),), "\u2028 a separator and \N{SNOWMAN}"),
    Text(3, (5, 9, 9, 4, 4), ((1, 2), (4, 5)), "a request and an answer"),
]


def written(folder: Path, texts: list[Text] = TEXTS) -> TextFile:
    file = TextFile(folder, ABOUT)
    file.add(texts)
    return file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written(tmp_path).finish()
    samples = load_texts(tmp_path)
    assert [sample.ids.tolist() for sample in samples] == [list(text.ids) for text in TEXTS]
    assert [sample.positions.tolist() for sample in samples] == [[0, 1, 2], [0], [0, 3]]
    assert samples[2].source == f"{tmp_path / NAME}:4" and len({sample.uid for sample in samples}) == 3
    again = TextFile(tmp_path, ABOUT)
    assert again.complete and again.texts == TEXTS


def test_a_text_that_is_there_is_not_added_again(tmp_path: Path) -> None:
    file = written(tmp_path)
    file.add([Text(9, TEXTS[0].ids, TEXTS[0].written, "the same"), Text(10, (1, 2), ((1, 2),), "new")])
    assert [text.number for text in file.texts] == [0, 1, 3, 10]
    assert TextFile(tmp_path, ABOUT).texts == file.texts


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_torn_end_is_cut_off(tmp_path: Path, lost: int) -> None:
    written(tmp_path)
    path = tmp_path / PARTIAL
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    file = TextFile(tmp_path, ABOUT)
    assert file.texts == TEXTS[:2] and not file.complete
    file.add(TEXTS[2:])
    assert path.read_bytes() == whole


def test_a_first_line_that_is_torn_begins_anew(tmp_path: Path) -> None:
    (tmp_path / PARTIAL).write_text('{"model": "mm')
    assert TextFile(tmp_path, ABOUT).texts == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(DataError, match=r"written with seed 1, but this run has 2; use the same, or another"):
        TextFile(tmp_path, {**ABOUT, "seed": 2})
    with pytest.raises(DataError, match=r"written with model mmmmmmmmmmmm, but this run has nnn"):
        TextFile(tmp_path, {**ABOUT, "model": "nnn"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there are no texts; run collect"),
        ('{"model": "m"}\n', "holds no text"),
        ('{"model": "m"}\n{"number": 0, "ids": [1, -2], "written": [], "text": ""}\n', "an id is no number"),
        ('{"model": "m"}\n{"number": 4, "ids": [1], "written": [[0, 2]], "text": ""}\n', "text 4 has 1 ids"),
        ('{"model": "m"}\n{"number": 0', "the last line has no end"),
        ("[1]\nx\n", "damaged"),
    ],
    ids=["none", "no text", "id", "stretch", "torn", "no json"],
)
def test_what_cannot_be_read(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / NAME).write_text(content)
    with pytest.raises(DataError, match=says):
        load_texts(tmp_path)


def test_unfinished_texts_are_told(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(DataError, match=r"its texts are unfinished; run collect with this rehearsal\.path first"):
        load_texts(tmp_path)


def test_pieces_are_joined_with_what_the_model_wrote() -> None:
    assert joined([([1, 2], False), ([3], True), ([], True), ([4], False), ([5, 6], True)]) == (
        (1, 2, 3, 4, 5, 6),
        ((2, 3), (4, 6)),
    )
