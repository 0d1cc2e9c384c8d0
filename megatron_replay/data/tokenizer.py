"""A model folder's tokenizer, of any kind of vocabulary file.

It has ids, decoding, stop tokens, chat template and fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_replay.data.backends import Backend, JsonBackend, PieceBackend, TiktokenBackend
from megatron_replay.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Text to ids and back. No method adds bos or eos by itself."""

    backend: Backend
    size: int
    """Number of ids it knows: the highest id, added tokens included, + 1."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a reply: the tokenizer's eos token, then those of generation_config.json (else config.json)."""
    bos_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    """True where texts begin with bos (a chat template writes its own)."""
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """bos_token, eos_token, ..., as chat templates name them."""
    fingerprint: str = ""
    """sha256 of everything that defines the vocabulary: the vocabulary file and the tokens added to it."""

    def encode(self, text: str, *, special: bool = True, continues: bool = False) -> list[int]:
        """Ids of `text`.

        - special: control tokens written in the text (also by a user) become their ids, as Hugging Face does. False
          reads them as plain text.
        - continues: the text follows other text, so a vocabulary that puts a space before every text must not do so
          here.

        Raises DataError for text that is no Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as err:
            raise DataError(
                f"character {err.start} of the text is half of a surrogate pair (U+{ord(text[err.start]):04X}); fix "
                "the text"
            ) from err
        return self.backend.encode(text, special=special, continues=continues)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of `ids`, without control tokens unless `special`. Raises DataError for an unknown id."""
        plain = [int(i) for i in ids]
        for i in plain:
            if not 0 <= i < self.size:
                raise DataError(
                    f"id {i} is outside the tokenizer's 0..{self.size - 1}; these ids come from another tokenizer"
                )
        return self.backend.decode(plain, special=special)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read tokenizer.json, else tokenizer.model (sentencepiece), else *.tiktoken (Qwen's), and the json files there.

    Raises DataError when none is there, or when one is damaged or contradicts another.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; give the model's folder, or set tokenizer to one that holds the tokenizer's "
            "files"
        )
    config = _json(folder / "tokenizer_config.json")
    vocabulary = _vocabulary(folder)
    added = _added(folder, config)
    names = _names(config, _json(folder / "special_tokens_map.json"))
    backend = _backend(vocabulary, added, names, config)
    names = _names(names, backend.names)
    generation, model = _json(folder / "generation_config.json"), _json(folder / "config.json")
    ids = {name: _named_id(backend, name, token, folder) for name, token in names.items()}
    bos_id = _first(ids.get("bos_token"), model.get("bos_token_id"))
    add_bos = config.get("add_bos_token")
    return Tokenizer(
        backend=backend,
        size=backend.size,
        eos_ids=_eos_ids(backend, ids.get("eos_token"), generation, model),
        bos_id=bos_id,
        pad_id=_first(ids.get("pad_token"), generation.get("pad_token_id"), model.get("pad_token_id")),
        add_bos=bos_id is not None and (backend.default_bos(bos_id) if add_bos is None else bool(add_bos)),
        chat_template=_chat_template(folder, config),
        special_tokens=names,
        fingerprint=_fingerprint(vocabulary, added),
    )


def _vocabulary(folder: Path) -> Path:
    for pattern in ("tokenizer.json", "tokenizer.model", "*.tiktoken"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataError(f"{folder}: several vocabularies: {', '.join(p.name for p in found)}; keep the one to use")
        if found:
            return found[0]
    raise DataError(
        f"{folder}: no tokenizer.json, tokenizer.model or *.tiktoken; copy the tokenizer's files there, or set "
        "tokenizer to their folder"
    )


def _backend(path: Path, added: Mapping[str, int], names: Mapping[str, str], config: Mapping[str, Any]) -> Backend:
    if path.suffix == ".json":
        return JsonBackend(path, added, names.values())
    if path.suffix == ".model":
        return PieceBackend(path, added, legacy=bool(config.get("legacy", False)))
    return TiktokenBackend(path)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise DataError(f"{path}: cannot be read as JSON: {err}; copy the file again") from err
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(tree).__name__}; copy the file again")
    return tree


def _added(folder: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """{token: id} from added_tokens.json and tokenizer_config.json."""
    try:
        added = {str(token): int(i) for token, i in _json(folder / "added_tokens.json").items()}
        return added | {str(entry["content"]): int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
    except (TypeError, ValueError, KeyError, AttributeError) as err:
        raise DataError(
            f"{folder}: added_tokens.json or added_tokens_decoder in tokenizer_config.json is not a map of tokens and "
            f"ids: {err!r}"
        ) from err


def _names(*sources: Mapping[str, Any]) -> dict[str, str]:
    """{"eos_token": "</s>", ...}: the first source that sets a name wins.

    A token is a string or {"content": string}.
    """
    names: dict[str, str] = {}
    for source in sources:
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = source.get(key)
            value = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(value, str):
                names.setdefault(key, value)
    return names


def _named_id(backend: Backend, name: str, token: str, folder: Path) -> int | None:
    found = backend.id_of(token)
    if found is None and name != "unk_token":
        raise DataError(
            f"{folder}: {name} is {token!r}, which the vocabulary does not hold; copy all of the tokenizer's files, "
            "or correct that name"
        )
    return found


def _eos_ids(
    backend: Backend, named: int | None, generation: Mapping[str, Any], model: Mapping[str, Any]
) -> tuple[int, ...]:
    ends = _first(generation.get("eos_token_id"), model.get("eos_token_id"))
    ids = [named, *(ends if isinstance(ends, list) else [ends])]
    if generation.get("chat_format") == "chatml":  # Qwen's first chat models say so instead of listing the token
        ids.append(backend.id_of("<|im_end|>"))
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the one in tokenizer_config.json.

    The latter is a text or a list of {name, template}, of which `default` or else the first counts.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as err:
            raise DataError(f"{file}: cannot be read: {err}") from err
    found = config.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in found}
        return named.get("default", next(iter(named.values())))
    except (TypeError, KeyError, StopIteration) as err:
        raise DataError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of name and template; "
            "correct it"
        ) from err


def _fingerprint(vocabulary: Path, added: Mapping[str, int]) -> str:
    digest = hashlib.sha256(vocabulary.suffix.encode() + b"\0")
    digest.update(vocabulary.read_bytes())
    digest.update(json.dumps(sorted(added.items(), key=lambda item: item[1])).encode())
    return digest.hexdigest()


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
