"""The measures of `evaluate`: each takes an open session and gives numbers, the same on every rank."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay import config as configs
from megatron_replay.data.packing import windows
from megatron_replay.data.records import Message
from megatron_replay.data.samples import load_samples
from megatron_replay.errors import DataError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.parallel.inference import token_nll
from megatron_replay.parallel.mcore.model import squared_distance
from megatron_replay.runtime.session import Session
from megatron_replay.scoring import score_choices


def perplexity(session: Session) -> dict[str, Any]:
    """exp of the mean NLL over windows that do not overlap, each predicting all but its first token."""
    asked = session.config.evaluate
    text = _read_text(Path(asked.text))[: asked.text_chars]
    try:
        parts = windows(session.tokenizer.encode(text), asked.window, asked.text_tokens)
    except DataError as err:
        raise DataError(f"{asked.text}: {err}") from err
    nll = _nll(session, parts, [np.arange(len(part) - 1) for part in parts], "perplexity")
    total = np.concatenate(nll)
    mean = float(total.mean(dtype=np.float64))
    return {"perplexity": math.exp(mean), "nll": mean, "tokens": len(total), "windows": len(parts)}


def target_nll(session: Session) -> dict[str, Any]:
    """Mean NLL of the target tokens of a data set, per token and per sample."""
    asked = session.config.evaluate
    data = configs.Data(
        path=asked.targets,
        template=session.config.data.template,
        seq_length=session.config.data.seq_length,
        limit=asked.limit,
    )
    samples = load_samples(data, session.tokenizer, template=session.template)
    nll = _nll(session, [s.ids for s in samples], [s.positions for s in samples], "targets")
    total = np.concatenate(nll)
    return {
        "nll": float(total.mean(dtype=np.float64)),
        "nll_per_sample": float(np.mean([part.sum(dtype=np.float64) for part in nll])),
        "tokens": len(total),
        "samples": len(samples),
    }


def multiple_choice(session: Session) -> dict[str, Any]:
    """Accuracy of the likeliest choice: lines of {"question", "choices", "answer": index}."""
    asked = session.config.evaluate
    questions = list(_choices(Path(asked.choice)))[: asked.limit]
    if not questions:
        raise DataError(f"{asked.choice}: empty; expected lines of {{question, choices, answer}}")
    sequences, positions = [], []
    for question, choices, _ in questions:
        prompt = session.template.prompt([Message("user", question)])
        for choice in choices:
            answer = session.tokenizer.encode(choice, continues=True)
            sequences.append(np.asarray([*prompt, *answer]))
            positions.append(np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1))
    nll = iter(_nll(session, sequences, positions, "choice"))
    rows = [[next(nll) for _ in choices] for _, choices, _ in questions]
    return dict(
        score_choices(
            [[float(part.sum()) for part in row] for row in rows],
            [[len(part) for part in row] for row in rows],
            [a for _, _, a in questions],
        )
    )


def distance(session: Session) -> dict[str, Any]:
    """|theta - theta_0| / |theta_0| over all parameters, theta_0 the base model's."""
    moved, size = squared_distance(session.model, HFFolder(session.config.evaluate.base))
    return {"relative_l2": math.sqrt(moved / size)}


def _nll(
    session: Session, sequences: Sequence[np.ndarray], positions: Sequence[np.ndarray], what: str
) -> list[np.ndarray]:
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


def _choices(path: Path) -> Iterator[tuple[str, list[str], int]]:
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            question, choices, answer = item["question"], item["choices"], item["answer"]
        except (ValueError, KeyError, TypeError) as err:
            raise DataError(
                f"{path}:{number}: a multiple-choice line is {{question, choices, answer}}; {type(err).__name__}: {err}"
            ) from err
        if not isinstance(choices, list) or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(f"{path}:{number}: answer {answer!r} is not the index of one of the {len(choices)} choices")
        yield str(question), [str(c) for c in choices], answer


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise DataError(f"{path}: byte {err.start} is not UTF-8; save the file as UTF-8") from err
    except OSError as err:
        raise DataError(f"{path}: cannot read: {err.strerror}") from err
