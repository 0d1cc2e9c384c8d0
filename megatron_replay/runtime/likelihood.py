"""Likelihoods that `evaluate` measures: perplexity of texts, and the NLL of a data set's target tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay import config as configs
from megatron_replay.data.packing import sliding_windows, windows
from megatron_replay.data.records import read_records
from megatron_replay.data.samples import Sample, load_samples
from megatron_replay.data.texts import load_texts
from megatron_replay.errors import DataError
from megatron_replay.parallel.inference import token_nll
from megatron_replay.runtime.questions import question_id
from megatron_replay.runtime.session import Session
from megatron_replay.runtime.sources import each
from megatron_replay.scoring.paired import ratio_interval

Row = dict[str, Any]
Window = tuple[np.ndarray, np.ndarray]
"""Ids, and the positions whose next token counts."""


def sequence_nll(
    session: Session, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray], what: str
) -> list[np.ndarray]:
    """NLL (nats, fp32) of the token after each position, one array a sequence; the same on every rank."""
    with session.progress(what, len(sequences), "sequences") as advance:
        return token_nll(
            session.model,
            sequences,
            positions,
            vocab_size=session.vocab_size,
            row_tokens=max(session.config.data.seq_length, 1) * session.config.batch.micro,
            share_prefixes=session.config.data.share_prefixes,
            progress=advance,
        )


def perplexity(session: Session) -> dict[str, Any]:
    """exp of the mean NLL over the windows of each text of `evaluate.text`."""
    return each(session.config.evaluate.text, "evaluate.text", lambda path: _perplexity(session, path))


def target_nll(session: Session) -> dict[str, Any]:
    """Mean NLL of the target tokens of each data set of `evaluate.targets`, per token and per sample."""
    return each(session.config.evaluate.targets, "evaluate.targets", lambda path: _target_nll(session, path))


def _perplexity(session: Session, path: Path) -> dict[str, Any]:
    parts = _windows(session, path)
    nll = sequence_nll(session, [ids for ids, _ in parts], [positions for _, positions in parts], "perplexity")
    total = np.concatenate(nll)
    mean = float(total.mean(dtype=np.float64))
    rows = [_row(ids, own) for (ids, _), own in zip(parts, nll, strict=True)]
    counts = {"tokens": len(total), "windows": len(parts)}
    return {"perplexity": math.exp(mean), "nll": mean, **_interval(rows), **counts, "rows": rows}


def _target_nll(session: Session, path: Path) -> dict[str, Any]:
    samples = _samples(session, path)
    nll = sequence_nll(session, [s.ids for s in samples], [s.positions for s in samples], "targets")
    total = np.concatenate(nll)
    rows = [_row(sample.ids, own) for sample, own in zip(samples, nll, strict=True)]
    return {
        "nll": float(total.mean(dtype=np.float64)),
        **_interval(rows),
        "nll_per_sample": float(np.mean([part.sum(dtype=np.float64) for part in nll])),
        "tokens": len(total),
        "samples": len(samples),
        "rows": rows,
    }


def _samples(session: Session, path: Path) -> list[Sample]:
    """The samples of a data set, or the texts of a rehearsal folder with the tokens that the base model wrote."""
    limit = session.config.evaluate.limit
    if path.is_dir():
        return [text for text in load_texts(path) if len(text.positions)][:limit]
    data = configs.Data(
        path=str(path),
        template=session.config.data.template,
        seq_length=session.config.data.seq_length,
        limit=limit,
    )
    return load_samples(data, session.tokenizer, template=session.template)


def _row(ids: np.ndarray, nll: np.ndarray) -> Row:
    return {
        "question": question_id(np.asarray(ids, dtype="<i4").tobytes()),
        "nll": float(nll.sum(dtype=np.float64)),
        "tokens": len(nll),
    }


def _interval(rows: Sequence[Row]) -> dict[str, float]:
    """The 95 % interval of the NLL a token, over windows or samples; nothing where there is only one."""
    if len(rows) < 2:
        return {}
    low, high = ratio_interval([row["nll"] for row in rows], [row["tokens"] for row in rows])
    return {"nll_low": low, "nll_high": high}


def _windows(session: Session, path: Path) -> list[Window]:
    asked = session.config.evaluate
    parts: list[Window] = []
    left = asked.text_chars
    for text in _documents(path):
        ids = session.tokenizer.encode(text[:left])
        left = None if left is None else left - len(text[:left])
        if len(ids[: asked.text_tokens]) < 2:
            continue
        if asked.stride is not None:
            parts += sliding_windows(ids, asked.window, asked.stride, asked.text_tokens)
        else:
            parts += [(part, np.arange(len(part) - 1)) for part in windows(ids, asked.window, asked.text_tokens)]
    if not parts:
        raise DataError(f"{path}: no document has 2 tokens, so there is nothing to predict; give a longer text")
    return parts


def _documents(path: Path) -> list[str]:
    """The texts of a file: the `text` of each line of a .jsonl, else all of it."""
    if path.suffix != ".jsonl":
        return [_read_text(path)]
    records = list(read_records(str(path)))
    for record in records:
        if record.text is None:
            raise DataError(
                f"{record.where}: evaluate.text reads lines of {{text}}; give prompts and answers to evaluate.targets"
            )
    return [record.text or "" for record in records]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise DataError(f"{path}: byte {err.start} is not UTF-8; save the file as UTF-8") from err
    except OSError as err:
        raise DataError(f"{path}: cannot read: {err.strerror}") from err
