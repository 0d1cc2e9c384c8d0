"""Small tokenizers of each kind, made on the spot."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

LINES = [
    "select name from singer where age > 30 order by age;",
    "How many heads of the departments are older than 56 ?",
    "the quick brown fox jumps over the lazy dog, again and again.\n",
    "SELECT count(*) FROM head WHERE age > 56",
] * 5

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(folder: Path, *, template: object = CHATML, **settings: object) -> Path:
    """A byte-level BPE tokenizer.json with ChatML's control tokens, as Qwen3's and SmolLM2's are."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"chat_template": template} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pieces(folder: Path, *, normalization: str = "identity", **settings: object) -> Path:
    """A sentencepiece BPE model with byte fallback, as Llama's is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder.parent / "text.txt"
    text.write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ranks(folder: Path, lines: list[str] | None = None) -> Path:
    """A file like qwen.tiktoken: the 256 bytes and a few merges."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([i]) for i in range(256)] + [b"se", b"le", b"ct", b"sele", b"select", b" n", b" na"]
    written = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("\n".join(written if lines is None else lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The makers above; test modules cannot import them."""
    return SimpleNamespace(byte_level=byte_level, pieces=pieces, ranks=ranks)


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("chatml") / "model")


@pytest.fixture(scope="session")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pieces(tmp_path_factory.mktemp("pieces") / "model")
