from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_replay.config import Data
from megatron_replay.data.samples import fingerprint, load_samples, make_sample, unique
from megatron_replay.data.template import load_template
from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from megatron_replay.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return load_tokenizer(chatml_folder)


def write(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SHORT = {"prompt": "a", "completion": "b", "db_id": "x"}
LONG = {"prompt": "name", "completion": "select name from singer " * 20}


def test_samples_in_file_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, SHORT, LONG)
    first, second = load_samples(Data(path=path), tokenizer)
    assert (first.source, second.source) == (f"{path}:1", f"{path}:2")
    assert first.extra == {"db_id": "x"}
    ids, mask, _ = load_template("auto", tokenizer).encode([*messages_of(SHORT)])
    assert first.ids.tolist() == ids.tolist()
    assert first.mask.tolist() == mask.tolist()
    assert (len(first.uid), len(first), first.ids.dtype, first.mask.dtype) == (16, len(ids), np.int32, np.bool_)


def messages_of(row: dict[str, Any]) -> list[Any]:
    from megatron_replay.data.records import Message

    return [Message("user", row["prompt"]), Message("assistant", row["completion"])]


def test_positions_are_before_the_targets() -> None:
    sample = make_sample(np.arange(6, dtype=np.int32), np.array([0, 1, 0, 0, 1, 1], bool), "t")
    assert sample.positions.tolist() == [0, 3, 4]
    assert sample.positions.dtype == np.int32


def test_uid_is_of_ids_mask_and_template() -> None:
    ids, mask = np.array([1, 2, 3], np.int32), np.array([False, True, True])
    uids = {
        make_sample(ids, mask, "t").uid,
        make_sample(ids, mask, "u").uid,
        make_sample(ids, np.array([False, False, True]), "t").uid,
        make_sample(np.array([1, 2, 4], np.int32), mask, "t").uid,
        make_sample(np.array([1, 2, 3, 0], np.int32), np.array([False, True, True, False]), "t").uid,
    }
    assert len(uids) == 5
    again = make_sample(ids.astype(np.int64), mask.astype(np.int8), "t", "other.jsonl:7", {"k": 1})
    assert again.uid == make_sample(ids, mask, "t").uid
    # written in stores: a change of the recipe makes them useless
    assert again.uid.hex() == "7d1997d4615a12cfc869c3fcc62745be"


def test_limit_counts_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, LONG, SHORT, SHORT | {"prompt": "c"}, SHORT | {"prompt": "d"})
    samples = load_samples(Data(path=path, limit=2, seq_length=20, over_length="drop"), tokenizer)
    assert [s.source.rsplit(":", 1)[1] for s in samples] == ["2", "3"]


def test_too_long(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, SHORT, LONG)
    n = len(load_samples(Data(path=path), tokenizer)[1])
    assert len(load_samples(Data(path=path, seq_length=n), tokenizer)) == 2
    with pytest.raises(
        DataError,
        match=rf"d\.jsonl:2: {n} tokens, but data\.seq_length is {n - 1}; raise it, or set data\.over_length=drop",
    ):
        load_samples(Data(path=path, seq_length=n - 1), tokenizer)
    with caplog.at_level(logging.WARNING):
        (kept,) = load_samples(Data(path=path, seq_length=n - 1, over_length="drop"), tokenizer)
    assert kept.source.endswith(":1")
    assert "dropped 1 samples longer than" in caplog.text
    _, cut = load_samples(Data(path=path, seq_length=n - 1, over_length="truncate"), tokenizer)
    whole = load_samples(Data(path=path), tokenizer)[1]
    assert cut.ids.tolist() == whole.ids[:-1].tolist()
    assert cut.mask.tolist() == whole.mask[:-1].tolist()
    assert cut.uid != whole.uid
    assert "cut 1 samples" in caplog.text


def test_nothing_left(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, LONG)
    with pytest.raises(DataError, match=r"d\.jsonl: all 1 samples are longer than data\.seq_length=8"):
        load_samples(Data(path=path, seq_length=8, over_length="drop"), tokenizer)
    with pytest.raises(DataError, match=r"d\.jsonl:1: cut to data\.seq_length=4 tokens it has no target left"):
        load_samples(Data(path=path, seq_length=4, over_length="truncate"), tokenizer)


def test_repeated_samples_are_trained_and_collected_once(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, SHORT, LONG, SHORT, SHORT | {"db_id": "y"})
    with caplog.at_level(logging.WARNING):
        samples = load_samples(Data(path=path), tokenizer)
    assert len(samples) == 4
    assert [s.source.rsplit(":", 1)[1] for s in unique(samples)] == ["1", "2"]
    assert "2 of 4 samples repeat an earlier one" in caplog.text


def test_skipped_turns_are_said(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"role": r, "content": c} for r, c in (("assistant", "Hi"), ("user", "a"), ("assistant", "b"))]
    with caplog.at_level(logging.WARNING):
        load_samples(Data(path=write(tmp_path, {"messages": turns})), tokenizer)
    assert "1 earlier assistant turns are context only" in caplog.text


def test_fingerprint_is_of_samples_and_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = load_samples(Data(path=write(tmp_path, SHORT, LONG)), tokenizer)
    assert fingerprint(samples) == fingerprint(load_samples(Data(path=write(tmp_path, SHORT, LONG)), tokenizer))
    assert len({fingerprint(samples), fingerprint(samples[::-1]), fingerprint(samples[:1])}) == 3
    plain = load_samples(Data(path=write(tmp_path, SHORT, LONG), template="plain"), tokenizer)
    assert fingerprint(plain) != fingerprint(samples)


def test_errors_inside_a_record_name_its_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "t.jinja").write_text(
        "{{ raise_exception('no') if messages[0].content == 'bad' }}x{{ messages[-1].content }}"
    )
    data = Data(path=write(tmp_path, SHORT, SHORT | {"prompt": "bad"}), template=str(tmp_path / "t.jinja"))
    with pytest.raises(DataError, match=r"d\.jsonl:2: the chat template refused the conversation: no;"):
        load_samples(data, tokenizer)
    with pytest.raises(DataError, match=r"d\.jsonl:1: character 0 of the text is half of a surrogate"):
        load_samples(Data(path=write(tmp_path, SHORT | {"completion": "\ud83d"}), template="plain"), tokenizer)


@pytest.mark.parametrize("size", [2, 3, 7, 64, 4096])
def test_windows_of_text_predict_each_token_once(tmp_path: Path, tokenizer: Tokenizer, size: int) -> None:
    text = "How many heads of the departments are older than 56 ?\n" * 3
    (tmp_path / "d.txt").write_text(text)
    samples = load_samples(Data(path=str(tmp_path / "d.txt"), seq_length=size), tokenizer)
    ids = tokenizer.encode(text)
    predicted = [i for s in samples for i in s.ids[1:].tolist()]
    assert predicted == ids[1:]
    assert all(2 <= len(s) <= size and not s.mask[0] and s.mask[1:].all() for s in samples)
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(samples))


def test_text_begins_with_bos_where_the_tokenizer_asks(tmp_path: Path, pieces_folder: Path) -> None:
    (tmp_path / "d.txt").write_text("select name")
    (sample,) = load_samples(Data(path=str(tmp_path / "d.txt")), load_tokenizer(pieces_folder))
    assert sample.ids[0] == 1
    assert sample.positions[0] == 0


def test_text_too_short(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(DataError, match=r"d\.txt:1: the text is a single token"):
        load_samples(Data(path=str(tmp_path / "d.txt")), tokenizer)
    (tmp_path / "d.txt").write_text("a b c")
    with pytest.raises(DataError, match=r"data\.seq_length=1 leaves nothing to predict"):
        load_samples(Data(path=str(tmp_path / "d.txt"), seq_length=1), tokenizer)


@pytest.mark.data
def test_real_text_in_windows(shared_data: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = (shared_data / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:20_000]
    (tmp_path / "d.txt").write_text(text, encoding="utf-8")
    samples = load_samples(Data(path=str(tmp_path / "d.txt"), seq_length=512), tokenizer)
    ids = [*samples[0].ids[:1].tolist(), *(i for s in samples for i in s.ids[1:].tolist())]
    assert tokenizer.decode(ids, special=True) == text
