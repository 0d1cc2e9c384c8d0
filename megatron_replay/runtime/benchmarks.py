"""Published benchmarks that `evaluate` measures: multiple choice by likelihood, and answers by generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay.config import Evaluate
from megatron_replay.data.records import Message
from megatron_replay.parallel.generation import generate
from megatron_replay.runtime.likelihood import sequence_nll
from megatron_replay.runtime.questions import question_id
from megatron_replay.runtime.session import Session
from megatron_replay.runtime.sources import each, named
from megatron_replay.scoring.choice import choice_context, choose, proportion, score_choices, scored
from megatron_replay.scoring.choice_layouts import Question, read_questions
from megatron_replay.scoring.generation import Problem, finished, one_task, problem_context, read_problems, verdicts
from megatron_replay.scoring.shots import DELIMITER, Asked, spread, with_examples

Result = dict[str, Any]


def multiple_choice(session: Session) -> Result:
    """Accuracy of the likeliest choice on each source of `evaluate.choice`."""
    return _each(session, "choice", _choice)


def generation(session: Session) -> Result:
    """Fractions of right answers on each source of `evaluate.generation`."""
    return _each(session, "generation", _generation)


def plain_ids(session: Session, text: str) -> list[int]:
    """Ids of a text that stands alone: after the tokenizer's bos token, where its texts begin with one."""
    tokenizer = session.tokenizer
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    return start + tokenizer.encode(text)


def continued(session: Session, text: str, after: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, positions) of `after` behind `text`, in the style of the run.

    Plain style encodes both together, after a delimiter, and splits where the text alone would end, as lm-eval does. In
    chat style the text is a user's turn, and the reply follows without a delimiter.
    """
    if session.config.evaluate.style == "chat":
        start = session.template.prompt([Message("user", text)])
        ids = [*start, *session.tokenizer.encode(after, continues=True)]
    else:
        start, ids = plain_ids(session, text), plain_ids(session, text + DELIMITER + after)
    first = min(len(start), len(ids) - 1)  # where a token spans the border, the last one still counts
    return np.asarray(ids), np.arange(first - 1, len(ids) - 1)


def check(asked: Evaluate) -> None:
    """Read all questions and examples, so that a mistake in them is found before the first measure runs."""
    for key, load in (("choice", _questions), ("generation", _problems)):
        for path, examples in _sources(asked, key).values():
            load(asked, path, examples)


def _sources(asked: Evaluate, key: str) -> dict[str, tuple[Path, Path | None]]:
    """{name: (questions, examples)} of a key: each source has the examples of its name, or those given for all."""
    examples = named(asked.examples, "evaluate.examples")
    shared = next(iter(examples.values()), None) if isinstance(asked.examples, str) else None
    sources = named(getattr(asked, key), f"evaluate.{key}")
    return {name: (path, examples.get(name, shared)) for name, path in sources.items()}


def _each(session: Session, key: str, measure: Callable[[Session, Path, Path | None], Result]) -> Result:
    asked = session.config.evaluate
    examples = dict(_sources(asked, key).values())
    return each(getattr(asked, key), f"evaluate.{key}", lambda path: measure(session, path, examples[path]))


def _questions(asked: Evaluate, path: Path, examples: Path | None) -> list[Asked[Question]]:
    own = read_questions(examples) if examples and asked.shots else None
    found = with_examples(read_questions(path), own, asked.shots, lambda one: one.subject)
    return spread(found, asked.limit)


def _problems(asked: Evaluate, path: Path, examples: Path | None) -> list[Asked[Problem]]:
    own = read_problems(examples) if examples and asked.shots else None
    found = with_examples(read_problems(path), own, asked.shots, lambda one: one.subject)
    one_task([one.question for one in found], path)
    return spread(found, asked.limit)


def _settings(session: Session, **more: str) -> Result:
    """How the questions were put, for the result to say."""
    return {"style": session.config.evaluate.style, **more, "shots": session.config.evaluate.shots}


def _choice(session: Session, path: Path, examples: Path | None) -> Result:
    kind = session.config.evaluate.choice_answers
    questions = _questions(session.config.evaluate, path, examples)
    contexts = [choice_context(asked, kind) for asked in questions]
    choices = [scored(asked.question, kind) for asked in questions]
    pairs = [continued(session, text, own) for text, row in zip(contexts, choices, strict=True) for own in row]
    nll = iter(sequence_nll(session, [ids for ids, _ in pairs], [positions for _, positions in pairs], "choice"))
    nlls = [[float(next(nll).sum(dtype=np.float64)) for _ in row] for row in choices]
    sizes = [[len(one.encode()) for one in row] for row in choices]
    answers = [asked.question.answer for asked in questions]
    rows = []
    for text, row, size, asked, own in zip(contexts, nlls, sizes, questions, choices, strict=True):
        picked, by_byte, right = choose(row), choose(row, size), asked.question.answer
        about = {"question": question_id(text), "answer": own[picked], "subject": asked.question.subject}
        rows.append({**about, "correct": picked == right, "nll": row[right], "prompt": text, "gold": own[right]})
        if kind == "text":
            rows.append({**about, "measure": "normalised", "answer": own[by_byte], "correct": by_byte == right})
    return {**_settings(session, answers=kind), **score_choices(nlls, sizes, answers), "rows": rows}


def _generation(session: Session, path: Path, examples: Path | None) -> Result:
    asked = session.config.evaluate
    problems = _problems(asked, path, examples)
    task = problems[0].question.task
    contexts = [problem_context(one) for one in problems]
    answers = [finished(text, task.stop) for text in _answers(session, contexts, task.stop, task.name)]
    judged = [verdicts(one.question, answer) for one, answer in zip(problems, answers, strict=True)]
    rows = [
        {
            "measure": name,
            "question": question_id(text),
            "correct": right,
            "prompt": text,
            "answer": answer,
            "gold": one.question.gold,
        }
        for text, answer, one, found in zip(contexts, answers, problems, judged, strict=True)
        for name, right in found.items()
    ]
    counts = {name: proportion(sum(found[name] for found in judged), len(judged)) for name in task.extract}
    length = {"max_new_tokens": asked.max_new_tokens, "questions": len(judged)}
    return {"task": task.name, **_settings(session), **counts, **length, "rows": rows}


def _answers(session: Session, contexts: Sequence[str], stop: str, what: str) -> list[str]:
    """Greedy answers, each ended by a stop token of the model or once it holds the stop text."""
    chat = session.config.evaluate.style == "chat"
    prompts = [session.template.prompt([Message("user", t)]) if chat else plain_ids(session, t) for t in contexts]
    with session.progress(what, len(prompts), "questions") as advance:
        found = generate(
            session.model,
            prompts,
            max_new_tokens=session.config.evaluate.max_new_tokens,
            stop_ids=session.stop_ids,
            vocab_size=session.vocab_size,
            batch=session.config.evaluate.batch,
            ended=holds(session, [stop]),
            progress=advance,
        )
    return [session.tokenizer.decode(tokens) for tokens in found]


def holds(session: Session, stops: Sequence[str]) -> Callable[[list[int]], bool]:
    """Whether the end of a continuation holds one of the texts. A token may carry more than the text's last letter."""
    length = max((len(stop.encode()) for stop in stops), default=0)
    decode = session.tokenizer.decode
    return lambda tokens: any(stop in decode(tokens[-length - 1 :]) for stop in stops)
