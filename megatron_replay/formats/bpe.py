"""tokenizer.json rebuilt from the vocabulary that a model file of another format carries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from megatron_replay.errors import CheckpointError

PRE_TOKENIZERS: dict[str, tuple[pre_tokenizers.PreTokenizer, ...]] = {
    "smollm": (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),),
}
"""The steps that cut text before merging, by llama.cpp's name for them."""
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""sentencepiece's visible space."""


def byte_level_bpe(tokens: Sequence[str], merges: Iterable[str], pre: str) -> Tokenizer:
    """A byte-level (GPT-2 style) tokenizer from its tokens in id order and its merges "left right" in rank order."""
    if pre not in PRE_TOKENIZERS:
        raise CheckpointError(f"pre-tokenizer {pre!r} is not known; known: {', '.join(sorted(PRE_TOKENIZERS))}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def scored_bpe(tokens: Sequence[str], scores: Sequence[float]) -> Tokenizer:
    """A sentencepiece-style BPE tokenizer, where the pair whose union scores best is merged first.

    Its tokens are <unk> <s> </s>, 256 byte tokens, then pieces. Spaces in pieces are visible spaces. The merges are
    every cut of a piece into two, best score first. <s> and a leading space are added to every text.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = [token for token in tokens[3:] if not _is_byte(token)]
    known = set(pieces)
    merges = [
        (-scores[vocab[piece]], vocab[piece[:cut]], vocab[piece[cut:]], piece, cut)
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    pairs = [(piece[:cut], piece[cut:]) for *_, piece, cut in sorted(merges)]
    tokenizer = Tokenizer(BPE(vocab, pairs, unk_token=tokens[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    tokenizer.post_processor = begin_with(tokens[1], 1)
    return tokenizer


def begin_with(token: str, token_id: int) -> processors.TemplateProcessing:
    """Put the begin-of-text token before every text."""
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, token_id)]
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
