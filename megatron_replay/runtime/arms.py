"""One run of a comparison: train in a session, measure in the same one, and keep the numbers, not the weights."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_replay import __version__
from megatron_replay.ablation import Arm
from megatron_replay.config import RunConfig
from megatron_replay.errors import ConfigError
from megatron_replay.runtime.output_paths import replace_file
from megatron_replay.runtime.session import Session
from megatron_replay.runtime.training import prepare, train
from megatron_replay.runtime.way_back import WayBack
from megatron_replay.scoring.table import flat

ROW = "row.json"


def trained(session: Session) -> dict[str, float]:
    """Train as the configuration says; returns the numbers of the run's last step and its costs.

    With one alpha in `average.sweep` the model then goes that far back to the base. Raises ConfigError for more.
    """
    feed, alphas = prepare(session), session.config.average.sweep
    if len(alphas) > 1:
        raise ConfigError(f"average.sweep={list(alphas)}: a run is measured at one alpha; make a recipe of each")
    way = WayBack(session.model) if alphas else None
    began = time.perf_counter()
    train(session, feed)
    if way is not None:
        way.add()
        way.move(alphas[0])
    log = Path(session.config.output) / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()][-feed.steps :]
    last = lines[-1]
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "steps": feed.steps,
        "tokens": sum(line["replay/tokens"] - line["replay/shared_tokens"] for line in lines),
        "loss": last[feed.loss.log_name],
        **{name: value for name, value in last.items() if name.startswith(("rehearsal/", "prompts/"))},
    }


def write_row(folder: Path, arm: Arm, costs: dict[str, float], result: dict[str, Any]) -> None:
    """Write the numbers of a run into its folder."""
    row = {
        "recipe": arm.recipe,
        "rate": arm.rate,
        "seed": arm.seed,
        "identity": arm.identity,
        "version": __version__,
        "costs": costs,
        "measures": dict(numbers(result)),
    }
    replace_file(folder / ROW, json.dumps(row, indent=1) + "\n")


def numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every number of a result; those of an interval are its own."""
    for name, value in flat(result).items():
        parts = value._asdict() if hasattr(value, "_asdict") else {"": value}
        for part, number in parts.items():
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                yield f"{name}.{part}".rstrip("."), float(number)


def read_row(folder: Path, identity: str) -> dict[str, Any] | None:
    """The numbers of a run that is done with this identity; None where it is not."""
    try:
        row = json.loads((folder / ROW).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(row) if row.get("identity") == identity else None


def configured(config: RunConfig, folder: Path) -> RunConfig:
    """A run's configuration with its outputs in its own folder, and none that it does not need."""
    evaluate = replace(config.evaluate, output=str(folder / "result.json"))
    train = replace(config.train, save="", load="", tensorboard=False)
    return replace(config, output=str(folder), train=train, evaluate=evaluate)
