"""The answers of an evaluation one by one, in `<evaluate.output>.questions.jsonl`.

A measure returns its lines under the key `PER_QUESTION`. Each line is an object with at least:

- index: the place of the question in its file, from 0
- uid: the question's own id, or a hash of its text, by which two runs are joined
- verdict: right, wrong, or left out (of the denominator)
- reason: why, in a line

`evaluate` adds the measure's name in front. A paired test joins two such files by measure, index and uid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.runtime.output_paths import replace_file

PER_QUESTION = "per_question"
RIGHT, WRONG, LEFT_OUT = "right", "wrong", "left out"
OWN_IDS = ("uid", "question_id", "id")
"""Keys under which a data set may name its questions."""

Line = Mapping[str, Any]


def question_uid(extra: Mapping[str, Any], *text: str) -> str:
    """The id that the record has among its other keys, or the first 16 hex digits of the sha256 of its text."""
    own = next((extra[key] for key in OWN_IDS if isinstance(extra.get(key), (str, int))), None)
    return str(own) if own is not None else hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]


def log_path(output: str | Path) -> Path:
    return Path(f"{output}.questions.jsonl")


def write_questions(output: str | Path, measures: Mapping[str, Iterable[Line]]) -> None:
    """Replace the log beside `output` by the lines of these measures; without any, remove it. Raises OSError."""
    path = log_path(output)
    lines = [{"measure": name, **line} for name, part in measures.items() for line in part]
    if lines:
        replace_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        path.unlink(missing_ok=True)  # an earlier run's, which would be taken for this one's


def read_questions(path: str | Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """(measure, index, uid) -> line, in order. Raises DataError for what is no such file."""
    found = {}
    try:
        with Path(path).open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                found[line["measure"], line["index"], line["uid"]] = line
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}; `evaluate` with evaluate.output writes it") from err
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{path}: line {len(found) + 1} is none of a question log ({type(err).__name__}: {err}); give the "
            ".questions.jsonl that `evaluate` wrote"
        ) from err
    return found
