"""One interface to three kinds of vocabulary file.

They are tokenizer.json, sentencepiece's tokenizer.model and Qwen's *.tiktoken.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol

import sentencepiece
import tiktoken
import tokenizers

from megatron_replay.errors import DataError

# The split pattern and the control tokens of Qwen's tokenizer (github.com/QwenLM/Qwen, tokenization_qwen)
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class Backend(Protocol):
    """The interface of a vocabulary file. `added` is {token: id}, the tokens that the folder adds to the file."""

    size: int
    """The highest id, + 1."""
    names: dict[str, str]
    """The bos_token, eos_token and pad_token that the file itself names."""

    def encode(self, text: str, *, special: bool, continues: bool) -> list[int]:
        """Ids of the text.

        - special: control tokens written in the text become their ids.
        - continues: the text follows other text, so no space is put before it.
        """
        ...

    def decode(self, ids: Sequence[int], *, special: bool) -> str: ...

    def id_of(self, token: str) -> int | None: ...

    def default_bos(self, bos_id: int | None) -> bool:
        """The default where the folder's configuration does not say: True if texts begin with bos."""
        ...


def _continue(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text that follows other text.

    Many sentencepiece-like vocabularies put a space before every text they encode. They never join a line break with
    what follows it. So the text is encoded after a line break, whose ids are then cut off again.
    """
    anchor, ids = encode("\n"), encode("\n" + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(text)


class JsonBackend:
    """tokenizer.json, through the `tokenizers` library."""

    def __init__(self, path: Path, added: Mapping[str, int], control: Iterable[str]) -> None:
        self.names: dict[str, str] = {}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as err:  # the library raises plain Exception
            raise DataError(
                f"{path}: not a tokenizer.json that the tokenizers library reads: {err}; copy the file again"
            ) from err
        self._tokenizer.no_truncation()  # saved files often carry the truncation of somebody's last batch
        self._tokenizer.no_padding()
        self._register(path, added, control)
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._puts_space = self._encode("a") != _continue(self._encode, "a")

    def _register(self, path: Path, added: Mapping[str, int], control: Iterable[str]) -> None:
        """Add the tokens that only the folder's configuration names, or mark them as control tokens."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        for token, wanted in sorted(added.items(), key=lambda item: item[1]):
            if token not in known:
                self._tokenizer.add_special_tokens([token])
            if (got := self._tokenizer.token_to_id(token)) != wanted:
                raise DataError(
                    f"{path}: tokenizer_config.json gives {token!r} the id {wanted}, but the vocabulary makes it "
                    f"{got}; the two files do not belong together"
                )
        self._tokenizer.add_special_tokens(
            [t for t in control if t not in known and self._tokenizer.token_to_id(t) is not None]
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str, *, special: bool, continues: bool) -> list[int]:
        self._tokenizer.encode_special_tokens = not special
        return _continue(self._encode, text) if continues and self._puts_space else self._encode(text)

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special))

    def id_of(self, token: str) -> int | None:
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def default_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None and list(self._tokenizer.encode("a", add_special_tokens=True).ids[:1]) == [bos_id]


class PieceBackend:
    """sentencepiece's tokenizer.model, with the folder's added tokens.

    legacy: put a space before the text after every control token, and not only at the start. The first Llama tokenizers
    did.
    """

    def __init__(self, path: Path, added: Mapping[str, int], *, legacy: bool) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as err:
            raise DataError(
                f"{path}: not a sentencepiece model; a tiktoken vocabulary must be named *.tiktoken"
            ) from err
        count = self._pieces.get_piece_size()
        known = {
            i: self._pieces.id_to_piece(i)
            for i in range(count)
            if self._pieces.is_control(i) or self._pieces.is_unknown(i)
        }
        self._control = {token: i for i, token in known.items()} | {
            token: i for token, i in added.items() if i >= count
        }
        self._texts = {i: token for token, i in self._control.items()}
        self._split = re.compile(
            "(" + "|".join(re.escape(t) for t in sorted(self._control, key=len, reverse=True)) + ")"
        )
        self._legacy = legacy
        named = {
            "bos_token": self._pieces.bos_id(),
            "eos_token": self._pieces.eos_id(),
            "pad_token": self._pieces.pad_id(),
        }
        self.names = {name: self._pieces.id_to_piece(i) for name, i in named.items() if i >= 0}
        self.size = max(count, *(i + 1 for i in self._control.values()))

    def _encode(self, text: str) -> list[int]:
        return list(self._pieces.encode(text)) if text else []

    def encode(self, text: str, *, special: bool, continues: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._split.split(text) if special else [text]):
            if i % 2:
                ids.append(self._control[part])
            elif part:
                ids += (
                    _continue(self._encode, part)
                    if (continues or ids) and not (self._legacy and ids)
                    else self._encode(part)
                )
        return ids

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        text = ""
        for control, run in groupby(ids, key=self._texts.__contains__):
            part = list(run)
            if not control:
                text += self._decode_on(part) if text else self._pieces.decode(part)
            elif special:
                text += "".join(self._texts[i] for i in part)
        return text

    def _decode_on(self, ids: list[int]) -> str:
        before = self._encode("a")[-1:]  # a space at the start of a text would be dropped, so some text stands first
        return str(self._pieces.decode(before + ids))[len(self._pieces.decode(before)) :]

    def id_of(self, token: str) -> int | None:
        if token in self._control:
            return self._control[token]
        found = int(self._pieces.piece_to_id(token))
        return None if found == self._pieces.unk_id() else found

    def default_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None


class TiktokenBackend:
    """Qwen's vocabulary file: lines of a base64 token and its rank.

    Text is brought to NFC and split by Qwen's pattern.
    """

    def __init__(self, path: Path) -> None:
        ranks = _ranks(path)
        self.names = {"eos_token": QWEN_CONTROL[0]}
        start = max(ranks.values()) + 1  # 151643 in Qwen's own file
        self._control = {token: start + i for i, token in enumerate(QWEN_CONTROL)}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=self._control
        )
        self._texts = {i: token for token, i in self._control.items()}
        self.size = start + len(QWEN_CONTROL)

    def encode(self, text: str, *, special: bool, continues: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        return list(self._encoding.encode(text, allowed_special="all" if special else set(), disallowed_special=()))

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        return self._encoding.decode([i for i in ids if special or i not in self._texts], errors="replace")

    def id_of(self, token: str) -> int | None:
        if token in self._control:
            return self._control[token]
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None

    def default_bos(self, bos_id: int | None) -> bool:
        return False


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as err:
            raise DataError(
                f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}; copy the file again"
            ) from err
    _check_ranks(path, ranks, ranks.values())
    return ranks


def _check_ranks(path: Path, ranks: Mapping[bytes, int], values: Iterable[int]) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:  # the library would panic on the first text that holds one
        raise DataError(
            f"{path}: no token for byte 0x{missing[0]:02x} ({len(missing)} of 256 bytes are missing); "
            "the file is cut short, or no byte-level vocabulary"
        )
    if len(set(values)) != len(ranks) or min(values) < 0:
        raise DataError(f"{path}: two tokens share a rank, or a rank is negative; copy the file again")
