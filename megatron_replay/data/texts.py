"""Texts that a model wrote: token ids as they were sampled, with marks at the tokens that are the model's own.

One line of JSON each, behind a line that names model and settings. The ids are kept because text encoded again may
give others. A file under way is `texts.partial.jsonl`, and a run that was stopped goes on behind its last whole line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay.data.samples import Sample, make_sample
from megatron_replay.errors import DataError, brief

NAME, PARTIAL = "texts.jsonl", "texts.partial.jsonl"
FINGERPRINT = hashlib.sha256(b"rehearsal 1").hexdigest()
"""The fingerprint that stands for the template in the uids of these samples: their ids are final."""


@dataclass(frozen=True)
class Text:
    """One text of a model."""

    number: int
    """Its draw: texts of other numbers are independent of it."""
    ids: tuple[int, ...]
    written: tuple[tuple[int, int], ...]
    """[start, stop) of the stretches of ids that the model wrote; what lies between was given to it."""
    text: str
    """The decoded ids, for people."""

    def sample(self, source: str) -> Sample:
        """The text as a sample whose targets are the tokens that the model wrote."""
        mask = np.zeros(len(self.ids), dtype=np.bool_)
        for start, stop in self.written:
            mask[start:stop] = True
        mask[:1] = False  # nothing predicts it
        return make_sample(np.asarray(self.ids, dtype=np.int32), mask, FINGERPRINT, source)


class TextFile:
    """The texts of a folder, while they are written. One rank uses it."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Begin, or go on with, the texts of these settings. Raises DataError for a folder with other settings'."""
        self.folder, self.about = folder, dict(about)
        self.path = folder / NAME if (folder / NAME).exists() else folder / PARTIAL
        self.complete = self.path.name == NAME
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_torn(self.path)
        if not self.path.exists() or not self.path.stat().st_size:
            self._append([self.about])
        theirs, self.texts = _read(self.path)
        for key, value in self.about.items():
            if theirs.get(key) != value:
                raise DataError(
                    f"{self.path}: written with {key} {brief(theirs.get(key))}, but this run has {brief(value)}; "
                    "use the same, or another rehearsal.path"
                )
        self._known = {text.ids for text in self.texts}

    def add(self, texts: Iterable[Text]) -> None:
        """Append the texts that are not there yet, and make them durable."""
        fresh = []
        for text in texts:
            if text.ids not in self._known:
                self._known.add(text.ids)
                fresh.append(text)
        self.texts += fresh
        self._append(map(_plain, fresh))

    def finish(self) -> None:
        """Give the file its final name."""
        os.replace(self.path, self.folder / NAME)
        self.complete = True

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as err:
            raise DataError(f"{self.path}: cannot be written: {err.strerror}") from err


def load_texts(folder: str | Path) -> list[Sample]:
    """The samples of a folder whose texts are complete, in their order. Raises DataError."""
    path = Path(folder) / NAME
    if not path.exists():
        why = "its texts are unfinished" if (Path(folder) / PARTIAL).exists() else "there are no texts"
        raise DataError(f"{folder}: {why}; run collect with this rehearsal.path first")
    _, texts = _read(path)
    if not texts:
        raise DataError(f"{path}: holds no text; remove the folder and collect again")
    return [text.sample(f"{path}:{line}") for line, text in enumerate(texts, 2)]


def _cut_torn(path: Path) -> None:
    """Cut off a last line without its end: the run was ended while it wrote that."""
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)


def _read(path: Path) -> tuple[dict[str, Any], list[Text]]:
    """The settings and the texts of a file."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines.pop():
            raise ValueError("the last line has no end")
        about, *rest = (json.loads(line) for line in lines)
        return dict(about), [_text(item) for item in rest]
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from err
    except (ValueError, KeyError, TypeError, IndexError) as err:
        raise DataError(f"{path}: damaged ({err}); remove the folder and collect again") from err


def _plain(text: Text) -> dict[str, Any]:
    return {"number": text.number, "ids": list(text.ids), "written": list(map(list, text.written)), "text": text.text}


def _text(item: Mapping[str, Any]) -> Text:
    ids, written = item["ids"], [tuple(span) for span in item["written"]]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ValueError("an id is no number")
    if not all(len(span) == 2 and 0 <= span[0] <= span[1] <= len(ids) for span in written):
        raise ValueError(f"text {item['number']} has {len(ids)} ids, and stretches {written}")
    return Text(int(item["number"]), tuple(ids), tuple(written), str(item["text"]))


def joined(pieces: Sequence[tuple[Sequence[int], bool]]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """(ids, written) of pieces of ids, each with a mark that says whether the model wrote it."""
    ids: list[int] = []
    written: list[tuple[int, int]] = []
    for piece, own in pieces:
        if own and piece:
            written.append((len(ids), len(ids) + len(piece)))
        ids += piece
    return tuple(ids), tuple(written)
