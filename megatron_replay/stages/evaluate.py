"""The gains and losses of a model, measured.

The measures are perplexity, target NLL, SQL that runs, multiple choice, answers by generation, and distance from the
base model.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from megatron_replay import __version__
from megatron_replay.config import RunConfig
from megatron_replay.errors import ConfigError, DataError
from megatron_replay.runtime import benchmarks, likelihood, sql_measure
from megatron_replay.runtime.distance import distance
from megatron_replay.runtime.output_paths import check_file, replace_file
from megatron_replay.runtime.questions import lines, questions_path, take_rows
from megatron_replay.runtime.session import Session, open_session
from megatron_replay.runtime.sources import named
from megatron_replay.scoring.table import show


def _lm_eval(session: Session) -> dict[str, Any]:
    """The module of this measure is imported when asked for, because it needs a package that is optional."""
    tasks = importlib.import_module("megatron_replay.runtime.harness").tasks
    return dict(tasks(session))


PARTS = {
    "text": likelihood.perplexity,
    "targets": likelihood.target_nll,
    "choice": benchmarks.multiple_choice,
    "generation": benchmarks.generation,
    "lm_eval": _lm_eval,
    "nl2sql": sql_measure.nl2sql,
    "base": distance,
}
"""Key of the `evaluate` section -> the measure that runs when that key is set."""


def run(config: RunConfig) -> None:
    """Run the measures whose files are given, print a table, and write `evaluate.output` as JSON.

    The questions one by one go into a file beside it, which `compare` reads.
    """
    check(config)
    with open_session(config, seq_length=config.data.seq_length) as session:
        evaluate(session)


def evaluate(session: Session) -> dict[str, Any]:
    """The measures of an open session; the same on every rank."""
    wanted = {key: part for key, part in PARTS.items() if getattr(session.config.evaluate, key)}
    result: dict[str, Any] = {"model": session.config.model, "version": __version__}
    for key, part in wanted.items():
        result[key] = part(session)
    rows = take_rows(result)
    if session.world.is_main:
        show(_numbers(result), f"evaluate {session.config.model}")
        if session.config.evaluate.output:
            output = Path(session.config.evaluate.output)
            _write(output, json.dumps(plain(result), indent=1) + "\n")
            _write(questions_path(output), lines(rows))
    session.world.barrier()
    return result


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers for the table; the example answers are in the JSON only."""
    return {
        key: _numbers(value) if isinstance(value, dict) else value
        for key, value in result.items()
        if not isinstance(value, list)
    }


def check(config: RunConfig) -> None:
    """Check what needs no ranks: that something is asked for, and that its files are there."""
    asked = config.evaluate
    if not any(getattr(asked, key) for key in PARTS):
        raise ConfigError(f"nothing to evaluate; set one of {', '.join('evaluate.' + key for key in PARTS)}")
    for key in (*(key for key in PARTS if key != "lm_eval"), "examples", "lm_eval_tasks"):
        for path in named(getattr(asked, key), f"evaluate.{key}").values():
            if not path.exists():
                raise DataError(f"evaluate.{key}={path}: no such file or folder")
    benchmarks.check(asked)
    if asked.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"evaluate.lm_eval={asked.lm_eval} needs lm-eval: pip install 'megatron-replay[eval]'")
    if asked.nl2sql and not (asked.databases and Path(asked.databases).is_dir()):
        raise DataError(
            f"evaluate.databases={asked.databases!r}: not a folder; nl2sql needs the folder of <db_id>.sqlite files"
        )
    if asked.output:
        check_file(asked.output, "evaluate.output")
        check_file(questions_path(asked.output), "evaluate.output")


def plain(value: Any) -> Any:
    """The result with named tuples as objects, because json would make them lists."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value._asdict() if hasattr(value, "_asdict") else value


def _write(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as err:
        raise ConfigError(
            f"evaluate.output={path}: cannot be written: {err.strerror}; the result stands in the table above"
        ) from err
