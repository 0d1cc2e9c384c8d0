"""Conversations to token ids and target marks, by the model's own chat template in a sandbox, or by none (`plain`).

**Which tokens are targets.** The tokens of each trained assistant turn are targets, up to and including its end-of-turn
token. Many templates write a line break after that. It is never sampled, so it is no target. A turn starts where the
template's generation prompt for the turns before it ends. So training sees exactly the text from which generation will
start. Text is cut at those points and each part is encoded by itself. So the ids of a prompt are always a prefix of
the sample's.

**Templates that rewrite history.** Qwen3 shows reasoning in the last reply only, with an empty `<think>` block where
there is none. Such a template may not show an earlier turn as `generation prompt + reply`. Then the turn is context,
not a target, and is counted in `Encoded.num_skipped`. Training on it would teach the model to answer where it should
start to think.

The last turn is always trained. Where even that one does not start with the generation prompt, its targets start at its
content. Replies without reasoning are rendered with `enable_thinking=False`. So an empty think block belongs to the
prompt and does not teach the model to stop thinking.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from megatron_replay.data.records import Message
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError

# The date that templates see. With today's, a sample would have another uid tomorrow, and its stored sets would not be
# found.
FIXED_DAY = datetime(2024, 7, 26)


class Encoded(NamedTuple):
    ids: NDArray[np.int32]
    """[n]"""
    mask: NDArray[np.bool_]
    """[n], true where the token is a target; never at 0, which nothing predicts."""
    num_skipped: int
    """Assistant turns that are context only: the template shows them otherwise than it would generate them."""


class Template(ABC):
    """A way to write a conversation for the model."""

    fingerprint: str
    """sha256 of the template, part of every sample's uid."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @abstractmethod
    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, thinking: bool = False
    ) -> str:
        """The conversation as text, with its control tokens."""

    @abstractmethod
    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids to generate the next assistant turn from."""

    @cached_property
    def turn_end(self) -> int | None:
        """The control token that ends every reply, and so is the last one trained; None where replies have none."""
        try:
            ends = {int(self.encode([Message("user", "a"), Message("assistant", b)]).ids[-1]) for b in ("b", "c d")}
        except DataError:  # a template that wants other turns; its replies are met in the data
            return None
        end = ends.pop()
        return None if ends or self.tokenizer.decode([end]) else end

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply: the token it is trained to end with, and those that the model's folder names."""
        trained = () if self.turn_end is None else (self.turn_end,)
        return tuple(dict.fromkeys((*trained, *self.tokenizer.eos_ids)))

    @abstractmethod
    def _pieces(self, messages: Sequence[Message]) -> tuple[list[tuple[list[int], bool]], int]:
        """(ids, whether they are targets) in order, and the number of skipped turns."""

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """Ids and targets, up to the end of the last trained turn. Raises DataError when there is no such turn."""
        last = max((i for i, m in enumerate(messages) if m.is_target), default=-1)
        if last < 0:
            raise DataError("no assistant turn to train on; add one or remove the record")
        pieces, skipped = self._pieces(messages[: last + 1])
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for part, _ in pieces])
        mask = np.concatenate([np.full(len(part), target) for part, target in pieces])
        mask[:1] = False
        if not mask.any():
            raise DataError(
                "the assistant turns give no target token; set data.template=plain or to a template that shows them"
            )
        return Encoded(ids, mask, skipped)


class PlainTemplate(Template):
    """No template: bos (where the tokenizer asks for it), the prompt and the completion unchanged, eos.

    Nothing is put between a prompt and its completion, so a space or line break there must be part of the data. Each is
    encoded by itself. One line break joins the turns before a completion (a system text and the prompt). eos ends every
    assistant turn.
    """

    fingerprint = hashlib.sha256(b"plain 1").hexdigest()

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        if not tokenizer.eos_ids:
            raise DataError(
                "the plain template ends replies with eos, but the tokenizer names none; set eos_token_id in "
                "generation_config.json"
            )

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, thinking: bool = False
    ) -> str:
        """The text as the class says, without bos, and with eos as the tokenizer writes it."""
        eos = self.tokenizer.decode(self.tokenizer.eos_ids[:1], special=True)
        return "".join(text + eos * is_reply for text, is_reply, _ in self._turns(messages))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return [i for ids, _ in self._pieces(messages)[0] for i in ids]

    def _pieces(self, messages: Sequence[Message]) -> tuple[list[tuple[list[int], bool]], int]:
        eos = list(self.tokenizer.eos_ids[:1])
        pieces = (
            [([self.tokenizer.bos_id], False)] if self.tokenizer.add_bos and self.tokenizer.bos_id is not None else []
        )
        for i, (text, is_reply, is_target) in enumerate(self._turns(messages)):
            pieces.append((self.tokenizer.encode(text, continues=i > 0) + eos * is_reply, is_target))
        return pieces, 0

    @staticmethod
    def _turns(messages: Sequence[Message]) -> list[tuple[str, bool, bool]]:
        """(text, whether it is a reply, whether it is a target); neighbouring turns that are no replies are joined."""
        turns: list[tuple[str, bool, bool]] = []
        for is_reply, group in groupby(messages, key=lambda m: m.role == "assistant"):
            if is_reply:
                turns += [(m.content, True, m.train) for m in group]
            else:
                turns.append(("\n".join(m.content for m in group), False, False))
        return turns


class ChatTemplate(Template):
    """A jinja2 template in the environment that Hugging Face gives it.

    A sandbox refuses it access to Python's internals.
    """

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        self.fingerprint = hashlib.sha256(b"jinja " + text.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as err:
            raise DataError(
                f"chat template, line {err.lineno}: {str(err.message).rstrip('.')}; correct it, or set "
                "data.template=plain"
            ) from err
        except Exception as err:  # a foreign program: jinja2 folds constants while it compiles
            raise DataError(f"chat template cannot be compiled: {err}; correct it, or set data.template=plain") from err

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, thinking: bool = False
    ) -> str:
        """The conversation as text. Raises DataError for anything that goes wrong inside the template."""
        turns = [{**m.extra, "role": m.role, "content": m.content} for m in messages]
        known: dict[str, Any] = {
            "tools": None,
            "documents": None,
            "enable_thinking": thinking,
            **self.tokenizer.special_tokens,
        }
        try:
            return self._template.render(messages=turns, add_generation_prompt=add_generation_prompt, **known)
        except Exception as err:  # a foreign program: all its errors are about the template or the conversation
            raise DataError(
                f"the chat template refused the conversation: {err or type(err).__name__}; fix the record, or set "
                "data.template"
            ) from err

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.encode(self.render(messages, add_generation_prompt=True))

    def _pieces(self, messages: Sequence[Message]) -> tuple[list[tuple[list[int], bool]], int]:
        whole, spans, skipped = self._spans(messages)
        pieces: list[tuple[list[int], bool]] = []
        done = 0
        for start, stop in spans:
            for text, target in ((whole[done:start], False), (whole[start:stop], True)):
                if text:
                    pieces.append((self.tokenizer.encode(text, continues=bool(pieces)), target))
            done = stop
        return pieces, skipped

    def _spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]], int]:
        """The rendered conversation, the [start, stop) characters of its trained turns, and the number of skipped."""
        thinking = any(
            m.role == "assistant" and ("<think>" in m.content or m.extra.get("reasoning_content")) for m in messages
        )
        whole = self.render(messages, thinking=thinking)
        spans, skipped = [], 0
        for i, message in enumerate(messages):
            if not message.is_target:
                continue
            is_last = i + 1 == len(messages)
            before = self.render(messages[:i], add_generation_prompt=True, thinking=thinking) if i else ""
            after = whole if is_last else self.render(messages[: i + 1], thinking=thinking)
            stop = len(after.rstrip())
            if i and whole.startswith(before) and whole[:stop] == after[:stop] and stop > len(before):
                spans.append((len(before), stop))
            elif is_last:
                spans.append((_content_start(whole, message.content, _agreement(whole, before)), stop))
            else:
                skipped += 1
        return whole, spans, skipped


def _agreement(a: str, b: str) -> int:
    """Number of leading characters that are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _content_start(whole: str, content: str, agreed: int) -> int:
    """The character at which the last reply's content begins.

    The rendering agrees with the generation prompt for `agreed` characters, so the content begins about there.
    """
    for text in (content.strip(), content.split("</think>")[-1].strip()):
        start = whole.rfind(text, 0, agreed + len(text))  # a content may begin like the rest of the generation prompt
        if agreed - start > len(text) or start < 0:
            start = whole.find(text, agreed)
        if start >= 0 and text:
            return start
    raise DataError(
        "the chat template does not show the last reply as it is written; set data.template=plain or to another "
        "template"
    )


def load_template(choice: str, tokenizer: Tokenizer) -> Template:
    """The template of a choice: auto, plain, or the path of a jinja2 file.

    auto is the tokenizer's own chat template, or plain where it has none. Raises DataError.
    """
    if choice == "plain" or (choice == "auto" and tokenizer.chat_template is None):
        return PlainTemplate(tokenizer)
    if choice == "auto":
        return ChatTemplate(tokenizer.chat_template or "", tokenizer)
    try:
        text = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or err
        raise DataError(
            f"data.template={choice}: cannot be read ({reason}); give auto, plain, or the path of a jinja2 file"
        ) from err
    try:
        return ChatTemplate(text, tokenizer)
    except DataError as err:
        raise DataError(f"{choice}: {err}") from err


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> jinja2.Undefined:
        # jinja2 itself would print nothing and go on, so nobody would notice a template that probes
        raise jinja2.exceptions.SecurityError(
            f"access to {attribute!r} of {type(obj).__name__} is not allowed in a template"
        )


class _GenerationMark(Extension):
    """The tag `{% generation %}`, accepted without effect.

    Some templates mark replies with it for Hugging Face's trainers.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = FIXED_DAY.strftime
    for name in ("lipsum", "cycler", "joiner"):  # no chat needs them, and each is one more object to break out from
        environment.globals.pop(name, None)
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without changes; jinja2's own tojson escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
