from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_replay.errors import CheckpointError
from megatron_replay.formats.bpe import SPACE, byte_level_bpe
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.formats.llama2c import import_llama2c, read_tokenizer


def encode_by_score(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """llama2.c's encoder: begin, a space before the text, characters (or bytes), then the best pair merged again and
    again."""
    ids = {token: i for i, token in reversed(list(enumerate(tokens)))}
    out = [ids[SPACE]] if text else []
    for char in text.replace(" ", SPACE):
        out += [ids[char]] if char in ids else [byte + 3 for byte in char.replace(SPACE, " ").encode()]
    while True:
        pairs = [
            (scores[ids[union]], -i)
            for i in range(len(out) - 1)
            if (union := tokens[out[i]] + tokens[out[i + 1]]) in ids
        ]
        if not pairs:
            return [1, *out]
        at = -max(pairs)[1]
        out[at : at + 2] = [ids[tokens[out[at]] + tokens[out[at + 1]]]]


def tokenizer_file(path: Path, pieces: list[str]) -> Path:
    """A llama2.c tokenizer: three special tokens, 256 bytes, then pieces, the earlier the better."""
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    raw = [(score, token.encode()) for score, token in zip(scores, tokens, strict=True)]
    path.write_bytes(
        struct.pack("<i", 9) + b"".join(struct.pack("<fi", score, len(token)) + token for score, token in raw)
    )
    return path


def model_file(path: Path, vocab: int, tied: bool) -> tuple[Path, np.ndarray]:
    """A llama2.c checkpoint of numbers 0, 1, 2, ...: dim 8, ffn 12, one layer, 2 heads, 1 key/value head, 5
    positions."""
    numbers = vocab * 8 + 8 + 64 + 32 + 32 + 64 + 8 + 3 * 96 + 8 + 5 * 4 + (0 if tied else vocab * 8)
    data = np.arange(numbers, dtype=np.float32)
    path.write_bytes(struct.pack("<7i", 8, 12, 1, 2, 1, vocab if tied else -vocab, 5) + data.tobytes())
    return path, data


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_comes_from_its_place(tmp_path, tied):
    tokenizer = tokenizer_file(tmp_path / "tok.bin", [" ", "a"])
    model, data = model_file(tmp_path / "model.bin", 261, tied)
    folder = HFFolder(import_llama2c(model, tokenizer, tmp_path / "out"))
    folder.check()
    assert folder.spec.tied == tied
    at = 261 * 8 + 8
    assert folder.read("model.layers.0.self_attn.q_proj.weight")[:, 0].tolist() == [
        at + 8 * row for row in (0, 2, 1, 3, 4, 6, 5, 7)
    ]
    assert (
        folder.read("model.layers.0.self_attn.o_proj.weight").flatten().tolist() == data[at + 128 : at + 192].tolist()
    )
    at += 192 + 8
    assert [
        folder.read(f"model.layers.0.mlp.{name}_proj.weight").flatten()[0].item() for name in ("gate", "down", "up")
    ] == [
        at,
        at + 96,
        at + 192,
    ]
    if not tied:
        assert folder.read("lm_head.weight").flatten().tolist() == data[-261 * 8 :].tolist()


def test_tokens_and_scores(tmp_path):
    tokens, scores = read_tokenizer(tokenizer_file(tmp_path / "tok.bin", [" ", "a", " a"]))
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[259:] == [SPACE, "a", SPACE + "a"]
    assert scores[259:] == [0.0, -1.0, -2.0]


def test_unusable_files(tmp_path):
    tokenizer = tokenizer_file(tmp_path / "tok.bin", [" ", "a"])
    model, _ = model_file(tmp_path / "model.bin", 261, True)
    raw = model.read_bytes()
    for content, said in (
        (raw[:-1], "its header promises"),
        (raw[:20], "20 bytes is too short"),
        (b"GGUF" + b"\0" * 100, "not a llama2.c checkpoint"),
        (struct.pack("<7i", 0x616B3432, 1, 0, 0, 0, 0, 0), "of version 1"),
    ):
        (tmp_path / "bad.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            import_llama2c(tmp_path / "bad.bin", tokenizer, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        import_llama2c(tmp_path / "nope.bin", tokenizer, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"260 tokens, but model\.bin has 261"):
        import_llama2c(model, tokenizer_file(tmp_path / "small.bin", [" "]), tmp_path / "out")
    (tmp_path / "cut.bin").write_bytes(tokenizer.read_bytes()[:-1])
    for path, said in (
        (tmp_path / "cut.bin", "truncated"),
        (model, "not a llama2.c tokenizer"),
        (tmp_path / "no.bin", "needs its tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=said):
            import_llama2c(model, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_pre_tokenizer_is_named():
    with pytest.raises(CheckpointError, match="'qwen2' is not known; known: gpt-2, smollm"):
        byte_level_bpe(["a"], [], "qwen2")


@pytest.fixture(scope="module")
def stories(tmp_path_factory, shared_file):
    model, tokenizer = shared_file("base_tiny/stories260K.bin"), shared_file("base_tiny/tok512.bin")
    return import_llama2c(model, tokenizer, tmp_path_factory.mktemp("stories") / "out")


def test_tokenizer_equals_the_greedy_merge_by_score(stories, shared_file):
    tokenizer = Tokenizer.from_file(str(stories / "tokenizer.json"))
    tokens, scores = read_tokenizer(shared_file("base_tiny/tok512.bin"))

    @settings(deadline=None, max_examples=50)
    @given(st.text("abcdefghilmnoprstuwyTLOI ,.\n\"'éñ€", max_size=80))
    def equal(text: str) -> None:
        ids = tokenizer.encode(text).ids
        assert ids == encode_by_score(text, tokens, scores)
        assert tokenizer.decode(ids) == text

    equal()
    for text in (
        "Once upon a time, there was a little girl named Lily.",
        "",
        " ",
        "  two  spaces ",
        "Zürich 🙂\n",
        "aaaaaaa hahaha",
    ):
        assert tokenizer.encode(text).ids == encode_by_score(text, tokens, scores), text


def test_greedy_story_is_fluent(stories):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(stories)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=40, do_sample=False)
    story = tokenizer.decode(out[0], skip_special_tokens=True)
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
