"""Look into candidate stores: inspect, verify, stats, repair, compare, export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_replay.errors import ConfigError
from megatron_replay.scoring.table import show
from megatron_replay.store import CandidateStore, compare, export, load_manifest, repair, verify


def run(action: str, paths: list[str], *, output: str | None, as_json: bool) -> int:
    """Run one action; returns 0, or 1 when verify finds damage or compare a difference."""
    if action == "compare" and len(paths) != 2:
        raise ConfigError(f"compare takes two stores, got {len(paths)}")
    if action == "export" and not output:
        raise ConfigError("export needs --output FILE.jsonl or FILE.parquet")
    if action == "compare":
        return _say(*_compare(*paths), title=f"compare {paths[0]} {paths[1]}", as_json=as_json)
    code = 0
    for path in paths:
        if action == "export":
            export(CandidateStore.open(path), Path(str(output)))
            continue
        result, wrong = ACTIONS[action](path)
        code |= _say(result, wrong, title=f"{action} {path}", as_json=as_json)
    return code


def _inspect(path: str) -> tuple[dict[str, Any], bool]:
    manifest = dataclasses.asdict(load_manifest(path))
    hidden = ("segments", "histograms")
    return {key: value for key, value in manifest.items() if key not in hidden} | {
        "segments": len(manifest["segments"])
    }, False


def _verify(path: str) -> tuple[dict[str, Any], bool]:
    report = verify(path)
    read = {"segments": report.segments, "blocks": report.blocks, "samples": report.samples}
    return {"ok": report.ok, **read, "problems": [str(problem) for problem in report.problems]}, not report.ok


def _stats(path: str) -> tuple[dict[str, Any], bool]:
    stats = CandidateStore.open(path).stats()
    return {**stats.counts(), **stats.summary()}, False


def _repair(path: str) -> tuple[dict[str, Any], bool]:
    """Keep the whole blocks; `collect` with the same settings then adds the lost ones."""
    return {"rewritten": repair(path).rewritten}, False


def _compare(left: str, right: str) -> tuple[dict[str, Any], bool]:
    found = compare(CandidateStore.open(left), CandidateStore.open(right))
    return {"same": found.same, **dataclasses.asdict(found)}, not found.same


def _say(result: dict[str, Any], wrong: bool, *, title: str, as_json: bool) -> int:
    if as_json:
        print(json.dumps(result, default=str))
    else:
        show({key: _text(value) for key, value in result.items()}, title)
    return int(wrong)


def _text(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text(inner) for key, inner in value.items()}
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value


ACTIONS: dict[str, Callable[[str], tuple[dict[str, Any], bool]]] = {
    "inspect": _inspect,
    "verify": _verify,
    "stats": _stats,
    "repair": _repair,
}
