"""The gains and losses of a model, measured.

The measures are perplexity, target NLL, SQL that runs, multiple choice, and distance from the base model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_replay import __version__
from megatron_replay.config import RunConfig
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.runtime import measures, sql_measure
from megatron_replay.runtime.output_paths import check_file, replace_file
from megatron_replay.runtime.question_log import PER_QUESTION, log_path, write_questions
from megatron_replay.runtime.session import Session, open_session
from megatron_replay.scoring.table import show

PARTS = {
    "text": measures.perplexity,
    "targets": measures.target_nll,
    "choice": measures.multiple_choice,
    "nl2sql": sql_measure.nl2sql,
    "base": measures.distance,
}
"""Key of the `evaluate` section -> the measure that runs when that key is set."""


def run(config: RunConfig) -> None:
    """Run the measures whose files are given, print a table, and write `evaluate.output` and its question log."""
    _check(config)
    with open_session(config, seq_length=config.data.seq_length) as session:
        evaluate(session)


def evaluate(session: Session) -> dict[str, Any]:
    """The measures of an open session; the same on every rank."""
    wanted = {key: part for key, part in PARTS.items() if getattr(session.config.evaluate, key)}
    result: dict[str, Any] = {"model": session.config.model, "version": __version__}
    for key, part in wanted.items():
        result[key] = part(session)
    questions = {key: result[key].pop(PER_QUESTION) for key in wanted if PER_QUESTION in result[key]}
    if session.world.is_main:
        show(_numbers(result), f"evaluate {session.config.model}")
        if session.config.evaluate.output:
            _write(Path(session.config.evaluate.output), result, questions)
    session.world.barrier()
    return result


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers for the table; the example answers are in the JSON only."""
    return {
        key: _numbers(value) if isinstance(value, dict) else value
        for key, value in result.items()
        if not isinstance(value, list)
    }


def _check(config: RunConfig) -> None:
    asked = config.evaluate
    if not any(getattr(asked, key) for key in PARTS):
        raise ConfigError(f"nothing to evaluate; set one of {', '.join('evaluate.' + key for key in PARTS)}")
    for key in PARTS:
        path = getattr(asked, key)
        if path and not Path(path).exists():
            raise DataError(f"evaluate.{key}={path}: no such file or folder")
    if asked.nl2sql and not (asked.databases and Path(asked.databases).is_dir()):
        raise DataError(
            f"evaluate.databases={asked.databases!r}: not a folder; nl2sql needs the folder of <db_id>.sqlite files"
        )
    if asked.output:
        check_file(asked.output, "evaluate.output")
        check_file(log_path(asked.output), "evaluate.output")


def _plain(value: Any) -> Any:
    """The result with named tuples as objects, because json would make them lists."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value._asdict() if hasattr(value, "_asdict") else value


def _write(path: Path, result: dict[str, Any], questions: dict[str, list[Any]]) -> None:
    try:
        write_questions(path, questions)
        replace_file(path, json.dumps(_plain(result), indent=1) + "\n")
    except OSError as err:
        raise ConfigError(
            f"evaluate.output={path}: cannot be written: {err.strerror}; the result stands in the table above"
        ) from err
