from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.data.backends import QWEN_PATTERN
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.errors import DataError

TEXTS = [
    "select name from singer where age > 30;",
    "How many heads ?\n",
    "SELECT count(*) FROM head",
    "",
    " ",
    "  two  spaces\n\n",
    "naïve 東京 🙂",
    "a<|im_end|>b</s> c<s>",
    "<unk>= 3",
]


def change(folder: Path, name: str, **entries: object) -> Path:
    path = folder / name
    tree = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tree | entries))
    return folder


# tokenizer.json


def test_json_is_the_librarys_own(chatml_folder: Path) -> None:
    ours, theirs = load_tokenizer(chatml_folder), tokenizers.Tokenizer.from_file(str(chatml_folder / "tokenizer.json"))
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.encode(text, continues=True) == ids
        assert ours.decode(ids, special=True) == theirs.decode(ids, skip_special_tokens=False) == text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.size == theirs.get_vocab_size() == max(theirs.get_vocab().values()) + 1


def test_control_tokens_in_text_only_when_asked(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    assert tokenizer.encode("<|im_end|>") == [2]
    plain = tokenizer.encode("<|im_end|>", special=False)
    assert 2 not in plain
    assert tokenizer.decode(plain) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2]  # the switch leaves no trace
    assert tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], special=True) == "<|im_end|>"


def test_names_ids_and_template(chatml_folder: Path) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.add_bos) == (None, (2,), 0, False)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


@pytest.mark.parametrize(("told", "expected"), [(0, (2, 0)), ([2, 0, 1], (2, 0, 1)), (None, (2, 1))])
def test_stop_ids(make: SimpleNamespace, tmp_path: Path, told: object, expected: tuple[int, ...]) -> None:
    folder = change(make.byte_level(tmp_path / "m"), "config.json", eos_token_id=1, bos_token_id=1)
    if told is not None:
        change(folder, "generation_config.json", eos_token_id=told)
    assert load_tokenizer(folder).eos_ids == expected
    assert load_tokenizer(folder).bos_id == 1


def test_names_may_be_objects_and_may_stand_in_the_map(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.byte_level(tmp_path / "m", eos_token={"content": "<|endoftext|>"}, pad_token=None)
    change(folder, "special_tokens_map.json", eos_token="<|im_end|>", pad_token={"content": "<|im_start|>"})
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((0,), 1)


def test_bos_as_the_configuration_or_else_the_file_asks(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.byte_level(tmp_path / "m", bos_token="<|im_start|>")
    assert not load_tokenizer(folder).add_bos
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    raw.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).add_bos
    assert load_tokenizer(folder).encode("select")[0] != 1
    assert not load_tokenizer(change(folder, "tokenizer_config.json", add_bos_token=False)).add_bos


def test_saved_truncation_and_padding_are_undone(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.byte_level(tmp_path / "m")
    raw = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=8)
    raw.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("one two three four five") == load_tokenizer(
        make.byte_level(tmp_path / "n")
    ).encode("one two three four five")


def test_tokens_added_by_the_configuration(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.byte_level(tmp_path / "m")
    before = load_tokenizer(folder)
    change(
        folder,
        "tokenizer_config.json",
        added_tokens_decoder={str(before.size): {"content": "<|extra|>"}, "2": {"content": "<|im_end|>"}},
    )
    after = load_tokenizer(folder)
    assert after.size == before.size + 1
    assert after.encode("a<|extra|>b") == [*after.encode("a"), before.size, *after.encode("b")]
    assert after.fingerprint != before.fingerprint
    change(folder, "tokenizer_config.json", added_tokens_decoder={"9999": {"content": "<|extra|>"}})
    with pytest.raises(DataError, match=r"gives '<\|extra\|>' the id 9999, but the vocabulary makes it \d+"):
        load_tokenizer(folder)


def test_a_named_end_token_that_the_file_holds_as_an_ordinary_word_becomes_a_control_token(
    make: SimpleNamespace, tmp_path: Path
) -> None:
    folder = make.byte_level(tmp_path / "m")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != "<|im_end|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert load_tokenizer(folder).encode("a<|im_end|>")[-1] == 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("T", "T"),
        (None, None),
        ([{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}], "T"),
        ([{"name": "chat", "template": "C"}], "C"),
    ],
)
def test_where_the_template_stands(
    make: SimpleNamespace, tmp_path: Path, template: object, expected: str | None
) -> None:
    folder = make.byte_level(tmp_path / "m", template=template)
    assert load_tokenizer(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("FILE")
    assert load_tokenizer(folder).chat_template == "FILE"


def test_metaspace_puts_no_space_where_text_continues(tmp_path: Path, pieces_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")

    (tmp_path / "tokenizer.model").write_bytes((pieces_folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "converted")
    tokenizer = load_tokenizer(tmp_path / "converted")
    first = tokenizer.encode("select name")
    assert tokenizer.decode(first) == "select name"
    assert tokenizer.decode(first + tokenizer.encode("from", continues=True)) == "select namefrom"
    assert tokenizer.decode(first + tokenizer.encode("from")) == "select name from"


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=40))
def test_json_round_trip(chatml_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(chatml_folder)
    assert tokenizer.decode(tokenizer.encode(text, special=False), special=True) == text


# sentencepiece


def test_pieces_are_the_librarys_own(pieces_folder: Path) -> None:
    ours = load_tokenizer(pieces_folder)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces_folder / "tokenizer.model"))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text, special=False) == ids
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert (ours.bos_id, ours.eos_ids, ours.pad_id, ours.add_bos, ours.size) == (1, (2,), None, True, 340)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("legacy", [False, True])
def test_pieces_with_added_tokens_are_as_in_transformers(make: SimpleNamespace, tmp_path: Path, legacy: bool) -> None:
    transformers = pytest.importorskip("transformers")

    added = {"340": {"content": "<|user|>", "special": True}, "341": {"content": "<|end|>", "special": True}}
    folder = make.pieces(tmp_path / "m", tokenizer_class="LlamaTokenizer", legacy=legacy, added_tokens_decoder=added)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "<|user|>select name<|end|>\nfrom<|end|>again<|user|>", "<s>select</s>name"]
    for text in texts:  # before a text that begins with a space sentencepiece puts another one, transformers does not
        if not text.startswith((" ", "<unk>")) and "</s> " not in text:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    assert ours.size == 342
    assert ours.fingerprint != load_tokenizer(make.pieces(tmp_path / "n")).fingerprint


def test_pieces_decode_around_control_tokens(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.pieces(tmp_path / "m", added_tokens_decoder={"340": {"content": "<|user|>"}})
    tokenizer = load_tokenizer(folder)
    text = "select<|user|> name</s>from"
    ids = tokenizer.encode(text)
    assert 340 in ids
    assert tokenizer.decode(ids, special=True) == text
    assert tokenizer.decode(ids) == "select namefrom"
    assert tokenizer.decode(tokenizer.encode("select") + tokenizer.encode("name", continues=True)) == "selectname"


def test_pieces_of_added_tokens_json(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.pieces(tmp_path / "m")
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 340}))
    tokenizer = load_tokenizer(change(folder, "tokenizer_config.json", pad_token="[PAD]", add_bos_token=False))
    assert (tokenizer.pad_id, tokenizer.size, tokenizer.add_bos) == (340, 341, False)


# tiktoken


def test_tiktoken_is_the_librarys_own(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = make.ranks(tmp_path / "m")
    ours = load_tokenizer(folder)
    table = {
        base64.b64decode(a): int(b)
        for a, b in (line.split() for line in (folder / "qwen.tiktoken").read_text().splitlines())
    }
    special = {"<|endoftext|>": 263, "<|im_start|>": 264, "<|im_end|>": 265, "<|extra_0|>": 266, "<|extra_204|>": 470}
    theirs = tiktoken.Encoding("t", pat_str=QWEN_PATTERN, mergeable_ranks=table, special_tokens=special)
    for text in [*TEXTS, "select<|im_end|>\n<|extra_0|><|extra_204|> name"]:
        ids = theirs.encode(text, allowed_special="all")
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == theirs.encode(text, disallowed_special=())
        assert ours.decode(ids, special=True) == theirs.decode(ids) == text
    assert ours.encode("select<|im_end|>") == [260, 265]
    assert (ours.size, ours.eos_ids, ours.bos_id, ours.add_bos) == (471, (263,), None, False)
    assert ours.encode("e\u0301") == ours.encode("\u00e9")  # NFC
    assert ours.decode([0xC3]) == "\ufffd"
    assert ours.backend.id_of("<|im_start|>") == 264
    assert ours.backend.id_of("nothing") is None


def test_first_qwen_chat_models_stop_at_im_end(make: SimpleNamespace, tmp_path: Path) -> None:
    folder = change(make.ranks(tmp_path / "m"), "generation_config.json", chat_format="chatml", eos_token_id=263)
    assert load_tokenizer(folder).eos_ids == (263, 265)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["IQ== 0", "nonsense"], r"qwen\.tiktoken:2: expected a base64 token and its rank, found b'nonsense'"),
        (["IQ== 0", "!! 1"], r":2: expected a base64 token"),
        (["IQ== x"], r":1: expected a base64 token"),
        (["IQ== 0"], r"no token for byte 0x00 \(255 of 256"),
        ([f"{base64.b64encode(bytes([i])).decode()} {i // 2}" for i in range(256)], r"two tokens share a rank"),
    ],
)
def test_damaged_tiktoken(make: SimpleNamespace, tmp_path: Path, lines: list[str], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_tokenizer(make.ranks(tmp_path / "m", lines))


# all of them


def test_fingerprint_is_the_vocabularys(make: SimpleNamespace, tmp_path: Path) -> None:
    a, b = (
        load_tokenizer(make.byte_level(tmp_path / "a")),
        load_tokenizer(make.byte_level(tmp_path / "b", template="other", eos_token="<|endoftext|>")),
    )
    assert a.fingerprint == b.fingerprint
    assert len(a.fingerprint) == 64
    path = tmp_path / "b" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_begin|>"))
    assert load_tokenizer(tmp_path / "b").fingerprint != a.fingerprint


def test_json_wins_over_pieces(make: SimpleNamespace, tmp_path: Path, chatml_folder: Path) -> None:
    folder = make.pieces(tmp_path / "m")
    (folder / "tokenizer.json").write_bytes((chatml_folder / "tokenizer.json").read_bytes())
    assert load_tokenizer(folder).fingerprint == load_tokenizer(chatml_folder).fingerprint


def test_ids_of_another_tokenizer(
    make: SimpleNamespace, chatml_folder: Path, pieces_folder: Path, tmp_path: Path
) -> None:
    for folder in (chatml_folder, pieces_folder, make.ranks(tmp_path / "m")):
        tokenizer = load_tokenizer(folder)
        for bad in (tokenizer.size, -1):
            with pytest.raises(DataError, match=rf"id {bad} is outside the tokenizer's 0\.\.{tokenizer.size - 1}"):
                tokenizer.decode([1, bad])


def test_half_a_surrogate_pair(chatml_folder: Path) -> None:
    with pytest.raises(DataError, match=r"character 2 of the text is half of a surrogate pair \(U\+D83D\)"):
        load_tokenizer(chatml_folder).encode("a \ud83d b")


def test_missing_and_damaged_files(make: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(DataError, match=r"no tokenizer\.json, tokenizer\.model or \*\.tiktoken"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"{}")
        with pytest.raises(DataError, match=rf"{name}: not a"):
            load_tokenizer(tmp_path)
    twice = make.ranks(tmp_path / "m")
    (twice / "other.tiktoken").touch()
    with pytest.raises(DataError, match=r"several vocabularies: other\.tiktoken, qwen\.tiktoken"):
        load_tokenizer(twice)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: cannot be read as JSON"),
        ("generation_config.json", "[]", r"generation_config\.json: expected a JSON object, found list"),
        ("config.json", b"\xff", r"config\.json: cannot be read as JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<|nope|>"}',
            r"eos_token is '<\|nope\|>', which the vocabulary does not hold",
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', r"chat_template is neither text nor a list"),
        ("tokenizer_config.json", '{"chat_template": []}', r"chat_template is neither text nor a list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', r"not a map of tokens and ids"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: cannot be read"),
    ],
)
def test_damaged_descriptions(
    make: SimpleNamespace, tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    folder = make.byte_level(tmp_path / "m")
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=expected):
        load_tokenizer(folder)
