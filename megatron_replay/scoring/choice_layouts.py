"""Multiple-choice questions in the layouts in which benchmarks are published.

| layout | keys |
|---|---|
| ours, MMLU | question, choices (or choice0, choice1, ...), answer: an index or a letter; csv or json |
| MMLU-Pro | question, options, answer: a letter (or answer_index), category |
| GPQA | Question, Correct Answer, Incorrect Answer 1, 2 and 3 |
| TeleQnA | question, option 1, option 2, ..., answer: "option 2: ...", category |
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.scoring.question_files import Item, read_items

GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
NUMBERED = re.compile(r"(?:choice|option) ?(\d+)")
ANSWER = re.compile(r"option (\d+)")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    text: str
    choices: tuple[str, ...]
    answer: int
    """Index of the right choice."""
    subject: str = ""


def read_questions(path: Path) -> list[Question]:
    """The questions of a file or folder, each in the layout that its keys show.

    Raises DataError, naming file and line, for a question of no known layout or with an answer that is no choice.
    """
    return [_question(item) for item in read_items(path)]


def _question(item: Item) -> Question:
    keys = item.keys
    if all(isinstance(keys.get(name), str) for name in ("Question", *GPQA)):
        return _gpqa(item)
    choices = _choices(keys)
    if not isinstance(keys.get("question"), str) or len(choices) < 2:
        raise DataError(
            f"{item.where}: a multiple-choice question is {{question, choices, answer}}, or laid out as MMLU, "
            f"MMLU-Pro, GPQA or TeleQnA; found {', '.join(map(str, keys)) or 'no keys'}"
        )
    if len(choices) > len(LETTERS):
        raise DataError(f"{item.where}: {len(choices)} choices have more letters than the alphabet; split the question")
    answer = _answer(keys, choices)
    if answer is None:
        raise DataError(
            f"{item.where}: answer {keys.get('answer')!r} is not the index of one of the {len(choices)} choices, "
            "nor its letter"
        )
    return Question(keys["question"].strip(), choices, answer, _subject(item))


def _choices(keys: Mapping[str, Any]) -> tuple[str, ...]:
    for name in ("choices", "options"):
        if isinstance(keys.get(name), list):
            return tuple(str(choice).strip() for choice in keys[name])
    numbered = sorted((int(found[1]), name) for name in keys if (found := NUMBERED.fullmatch(name)))
    return tuple(str(keys[name]).strip() for _, name in numbered if keys[name] not in (None, ""))


def _answer(keys: Mapping[str, Any], choices: tuple[str, ...]) -> int | None:
    """Index of the answer: a number, a letter, or "option 2: ..." (counted from 1); None where it is none of these."""
    given = keys.get("answer_index", keys.get("answer"))
    text = str(given).strip()
    if isinstance(given, bool):
        return None
    if found := ANSWER.match(text):
        index = int(found[1]) - 1
    elif len(text) == 1 and text.upper() in LETTERS:
        index = LETTERS.index(text.upper())
    else:
        index = int(text) if text.isdecimal() else -1
    return index if 0 <= index < len(choices) else None


def _gpqa(item: Item) -> Question:
    """The right answer comes first in the file. Here the order is that of a hash, the same in every run."""
    question = item.keys["Question"].strip()
    choices = [item.keys[name].strip() for name in GPQA]
    right = choices[0]
    choices.sort(key=lambda choice: hashlib.sha256(f"{question}\n{choice}".encode()).digest())
    return Question(question, tuple(choices), choices.index(right), str(item.keys.get("High-level domain", "")))


def _subject(item: Item) -> str:
    """The question's own, else the file's name where the file is one of MMLU's."""
    own = item.keys.get("subject") or item.keys.get("category")
    return str(own).replace("_", " ") if own else item.subject if ".csv:" in item.where else ""
