"""Read data files: five jsonl formats and plain text become `Record`s. Every mistake is named with its file and line.

| format | one record |
|---|---|
| prompt_completion | {"prompt": "...", "completion": "..."}; "response" is another name of "completion" |
| alpaca | {"instruction": "...", "input": "...", "output": "..."}; input may be missing or empty |
| sharegpt | {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]} |
| messages | {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 1}]} |
| text | a .txt file as one document, or {"text": "..."} |

The first three may carry a top-level "system". Keys that a format does not know are kept in `Record.extra`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
# The key by which a format is recognised, in the order in which the formats are tried. "text" comes last because alpaca
# files often carry it as a copy.
_KEY_OF = {
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
    "prompt_completion": "prompt",
    "text": "text",
}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `train` says whether the tokens of an assistant turn are targets. `extra` goes to the chat template as it is.
    """

    role: str
    content: str
    train: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_target(self) -> bool:
        return self.role == "assistant" and self.train


@dataclass(frozen=True)
class Record:
    """One line of a data file: a conversation, or (with `text` set) a document."""

    source: str
    line: int
    messages: tuple[Message, ...] = ()
    text: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}"

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last assistant turn; all turns where there is none."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=len(self.messages))
        return self.messages[:last]


def read_records(paths: str, format: str = "auto", *, targets: bool = True) -> Iterator[Record]:
    """Read the comma-separated files in turn.

    - format: auto decides per file from the keys of its first record, and every later record of the file must fit.
    - targets: a record without anything to train on is an error. False reads prompts for generation, where the
      completion may be missing.

    Raises DataError, naming file and line, for a record that does not fit.
    """
    files = [Path(name.strip()) for name in paths.split(",") if name.strip()]
    if not files:
        raise DataError("no data file was named; set data.path to a .jsonl or .txt file")
    for path in files:
        if not path.is_file():
            raise DataError(f"{path}: no such file; give a .jsonl or .txt file, several separated by commas")
    if format != "auto" and format not in _KEY_OF:
        raise DataError(f"unknown data format {format!r}; known: auto, {', '.join(_PARSERS)}")
    for path in files:
        yield from _read(path, format, targets)


def _read(path: Path, format: str, targets: bool) -> Iterator[Record]:
    if path.suffix == ".txt" and format in ("auto", "text"):
        yield _document(path)
        return
    chosen = "" if format == "auto" else format
    read = False
    for line, obj in _json_lines(path):
        where = f"{path}:{line}"
        chosen = chosen or _guess(obj, where)
        if _KEY_OF[chosen] not in obj:
            why = "of the first record" if format == "auto" else "data.format says so"
            raise DataError(
                f"{where}: no {_KEY_OF[chosen]!r} key (read as {chosen} because {why}); found {_keys(obj)}; fix it "
                "or set data.format"
            )
        yield _PARSERS[chosen](_Fields(obj, str(path), line, targets))
        read = True
    if not read:
        raise DataError(f"{path}: empty; expected at least one record")


def _document(path: Path) -> Record:
    text = "".join(part for _, part in _lines(path))
    if not text.strip():
        raise DataError(f"{path}:1: empty; expected text")
    return Record(str(path), 1, text=text)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open("rb") as file:
            for line, raw in enumerate(file, 1):
                try:
                    yield line, raw.decode("utf-8-sig" if line == 1 else "utf-8")
                except UnicodeDecodeError as err:
                    raise DataError(
                        f"{path}:{line}: byte {err.start + 1} of the line is not UTF-8 (0x{raw[err.start]:02x}); "
                        "convert the file to UTF-8"
                    ) from err
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}") from err


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            obj = json.loads(text)
        except json.JSONDecodeError as err:
            if line == 1 and text.lstrip().startswith("["):
                raise DataError(
                    f"{path}:1: a JSON array, not one record per line; convert it with: jq -c '.[]' {path.name}"
                ) from err
            raise DataError(
                f"{path}:{line}: broken JSON at column {err.colno}: {err.msg}; fix or remove the line"
            ) from err
        except (RecursionError, ValueError) as err:
            raise DataError(f"{path}:{line}: JSON that cannot be read ({err}); fix or remove the line") from err
        if not isinstance(obj, dict):
            raise DataError(
                f"{path}:{line}: expected a JSON object with keys, found {_kind(obj)}; write one record per line"
            )
        yield line, obj


def _guess(obj: dict[str, Any], where: str) -> str:
    fits = [name for name, key in _KEY_OF.items() if key in obj]
    if len(fits) > 1 and fits[1] != "text":
        raise DataError(
            f"{where}: the keys {_keys(obj)} fit {' and '.join(n for n in fits if n != 'text')}; say which with "
            "data.format"
        )
    if not fits:
        raise DataError(f"{where}: the keys {_keys(obj)} fit no format; expected one of {', '.join(_KEY_OF.values())}")
    return fits[0]


class _Fields:
    """The keys of one record, taken one by one. The keys that nobody took become the record's `extra`."""

    def __init__(self, obj: dict[str, Any], source: str, line: int, targets: bool) -> None:
        self.rest, self.source, self.line, self.targets = dict(obj), source, line, targets

    def fail(self, message: str) -> DataError:
        return DataError(f"{self.source}:{self.line}: {message}")

    def string(self, key: str, *, default: str | None = None) -> str:
        value = self.rest.pop(key, None)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.fail(f"no {key!r}; add it or remove the record")
        if not isinstance(value, str):
            raise self.fail(f"{key!r} must be a string, found {_kind(value)}")
        return value

    def conversation(self, prompt: str, reply_key: str) -> Record:
        reply = self.string(reply_key, default=None if self.targets else "")
        messages = [Message("user", prompt)]
        if reply.strip():
            messages.append(Message("assistant", reply))
        elif self.targets:
            raise self.fail(f"{reply_key!r} is empty, so there is nothing to train on; fill it in or remove the record")
        return self.record(messages)

    def record(self, messages: list[Message]) -> Record:
        system = self.string("system", default="")
        if system:
            messages = [Message("system", system), *messages]
        if self.targets and not any(m.is_target for m in messages):
            raise self.fail("no assistant turn to train on; add one or remove the record")
        return Record(self.source, self.line, tuple(messages), None, self.rest)

    def turns(self, key: str, role_key: str, content_key: str, roles: Mapping[str, str]) -> list[Message]:
        value = self.rest.pop(key)
        if not isinstance(value, list) or not value:
            raise self.fail(f"{key!r} must be a list with at least one turn, found {_kind(value)}")
        return [self._turn(f"{key}[{i}]", turn, role_key, content_key, roles) for i, turn in enumerate(value)]

    def _turn(self, name: str, turn: Any, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
        if not isinstance(turn, dict):
            raise self.fail(f"{name} must be an object with {role_key!r} and {content_key!r}, found {_kind(turn)}")
        rest = dict(turn)
        role, content, weight = rest.pop(role_key, None), rest.pop(content_key, None), rest.pop("weight", 1)
        if not isinstance(role, str) or role not in roles:
            raise self.fail(f"{name}: unknown role {role!r} in {role_key!r}; known: {', '.join(roles)}")
        if not isinstance(content, str):
            raise self.fail(f"{name}: {content_key!r} must be a string, found {_kind(content)}")
        if weight not in (0, 1):
            raise self.fail(f"{name}: 'weight' is 0 (context only) or 1 (trained), found {weight!r}")
        message = Message(roles[role], content, bool(weight), rest)
        if message.is_target and self.targets and not content.strip():
            raise self.fail(f"{name}: empty assistant turn; fill it in, give it weight 0, or remove the record")
        return message


def _prompt_completion(fields: _Fields) -> Record:
    prompt = fields.string("prompt")
    return fields.conversation(
        prompt, "response" if "response" in fields.rest and "completion" not in fields.rest else "completion"
    )


def _alpaca(fields: _Fields) -> Record:
    if fields.rest.get("history"):
        raise fields.fail("alpaca's 'history' is not read; write the record as messages")
    instruction, given = fields.string("instruction"), fields.string("input", default="")
    return fields.conversation(f"{instruction}\n{given}" if given else instruction, "output")


def _sharegpt(fields: _Fields) -> Record:
    return fields.record(fields.turns("conversations", "from", "value", _SHAREGPT_ROLES))


def _messages(fields: _Fields) -> Record:
    messages = fields.turns("messages", "role", "content", {role: role for role in ROLES})
    if messages[0].role == "system" and fields.rest.get("system"):
        raise fields.fail("both a 'system' key and a system turn; keep one")
    return fields.record(messages)


def _text(fields: _Fields) -> Record:
    text = fields.string("text")
    if not text.strip():
        raise fields.fail("'text' is empty; fill it in or remove the record")
    return Record(fields.source, fields.line, (), text, fields.rest)


_PARSERS: dict[str, Callable[[_Fields], Record]] = {
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "text": _text,
}


def _keys(obj: Mapping[str, Any]) -> str:
    return ", ".join(repr(k) for k in list(obj)[:8]) + (", ..." if len(obj) > 8 else "") if obj else "no keys"


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true/false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return (
        f"{names[type(value)]} ({str(value)[:40]!r})"
        if isinstance(value, (str, int, float)) and value is not None
        else names[type(value)]
    )
