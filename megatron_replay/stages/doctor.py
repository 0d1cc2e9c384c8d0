"""Report what this machine can run, and what is missing.

Versions are read first, from the packages' metadata. Nothing is imported for that, so a broken package is reported and
does no harm. Then torch and megatron look around, if they are there at all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_replay import __version__
from megatron_replay.config import RunConfig
from megatron_replay.environment import Finding
from megatron_replay.errors import ReplayError
from megatron_replay.scoring.table import show

PYTHON = ((3, 10), (3, 12))
"""Python versions: at least the first, below the second."""
REQUIRED: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "torch": ((2, 6), None),
    "megatron-core": ((0, 12), (0, 17)),
    "numpy": ((1, 26), None),
    "safetensors": ((0, 4, 3), None),
    "tokenizers": ((0, 19), None),
}
"""Packages without which no model runs, and their versions: at least the first, below the second."""
OPTIONAL = ("torch-npu", "mindspeed", "megatron-adaptor", "apex", "transformer-engine", "transformers")
"""Packages that are used where they are present."""
PARTS = ("devices", "kernels", "processor", "environment", "megatron", "all_reduce", "model", "operators")
"""Parts of the report: the findings of the functions of `doctor.machine`; None where one could not look."""
GIB = 2**30


def run(config: RunConfig, *, as_json: bool, ops: bool = False) -> int:
    """Print the report; returns 0 when the main job can run with this configuration, 1 when it cannot.

    ops: also run Stage 0 and training on a tiny model, and list their operators.
    """
    report = examine(config, ops=ops)
    if as_json:
        print(json.dumps(report))
    else:
        show(_table(report), "megatron-replay doctor")
        if report["operators"]:
            show(report["operators"], "operators of a tiny collect and train, and how often")
        print("\n".join(_lines(report)))
    return 0 if report["ok"] else 1


def examine(config: RunConfig, *, ops: bool = False) -> dict[str, Any]:
    """The report. Its keys are always the same: ok, verdict, problems, notes, versions, PARTS, disk."""
    versions, problems = _versions()
    found: dict[str, Any] = dict.fromkeys(PARTS)
    if not problems:  # import nothing that is known not to work
        found, problems = _look(config, versions, ops)
    report = {"versions": versions, **found, "disk": _disk(Path(config.output))}
    return {
        "ok": not problems,
        "verdict": _verdict(config, found["devices"], problems),
        "problems": problems,
        "notes": _notes(config, report),
        **report,
    }


def _versions() -> tuple[dict[str, str | None], list[str]]:
    """(package -> version, None where it is not installed; problems).

    There is a problem, with its way out, for each missing or unfit package.
    """
    found: dict[str, str | None] = {"megatron-replay": __version__, "python": platform.python_version()}
    problems = []
    if not PYTHON[0] <= sys.version_info[:2] < PYTHON[1]:
        problems.append(f"python {found['python']} is not supported; use {_range('', *PYTHON)}")
    for name, (low, high) in REQUIRED.items():
        found[name] = version = _installed(name)
        if version is None:
            problems.append(f"{name} is not installed; pip install '{_range(name, low, high)}'")
        elif not _within(version, low, high):
            problems.append(f"{name} {version} is not supported; pip install '{_range(name, low, high)}'")
    return {**found, **{name: _installed(name) for name in OPTIONAL}}, problems


def _installed(name: str) -> str | None:
    try:
        return str(importlib.metadata.version(name) or "no version in its metadata")
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as err:  # metadata cut short or unreadable can raise anything
        return f"metadata cannot be read ({type(err).__name__})"


def _within(version: str, low: tuple[int, ...], high: tuple[int, ...] | None) -> bool:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    numbers = tuple(int(part or 0) for part in found.groups()) if found else ()
    return bool(numbers) and low <= numbers and (high is None or numbers < high)


def _range(name: str, low: tuple[int, ...], high: tuple[int, ...] | None) -> str:
    return f"{name}>={'.'.join(map(str, low))}" + (f",<{'.'.join(map(str, high))}" if high else "")


def _look(config: RunConfig, versions: dict[str, str | None], ops: bool) -> tuple[dict[str, Any], list[str]]:
    """Every part of the report; a part that fails does not keep the others from looking."""
    found: dict[str, Any] = dict.fromkeys(PARTS)
    problems: list[str] = []

    def part(key: str, look: Callable[[], Any]) -> None:
        try:
            found[key] = look()
        except ReplayError as err:
            problems.append(str(err))
        # a broken package can raise anything, also at import; the report says which part it broke
        except Exception as err:
            problems.append(f"{key}: {type(err).__name__}: {' '.join(str(err).split())}")

    try:
        machine = importlib.import_module("megatron_replay.doctor.machine")
        device = importlib.import_module("megatron_replay.device")
    except Exception as err:
        return found, [
            f"cannot be imported: {type(err).__name__}: {' '.join(str(err).split())}; install the package it names "
            "again"
        ]
    part("all_reduce", lambda: machine.all_reduce(config))  # first: it forks, before any device is touched
    part("devices", machine.devices)
    part("kernels", lambda: machine.kernels(config.kernels))
    part("processor", machine.processor)
    part("environment", lambda: machine.variables(config))
    part("megatron", lambda: machine.megatron(config, versions))
    part("device", lambda: device.dtype(config.precision, device.choose(config.device)))
    if config.model:
        part("model", lambda: machine.model(config))
    if ops:
        part("operators", lambda: machine.operators(config))
    trial = found["all_reduce"]
    if trial and not trial["ok"]:
        problems.append(f"{trial['ranks']} ranks over {trial['backend']} cannot add up a tensor: {trial['error']}")
    return {key: found[key] for key in PARTS}, problems


def _verdict(config: RunConfig, devices: dict[str, Any] | None, problems: list[str]) -> str:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"the main job cannot run: {problems[0]}{more}"
    usable = {name: device for name, device in (devices or {}).items() if config.device in ("auto", name)}
    each = [
        f"{name} ({device['count']} x {device['free_bytes'] / GIB:.1f} GiB free)" for name, device in usable.items()
    ]
    return f"the main job can run on: {', '.join(each)}"


def _notes(config: RunConfig, report: dict[str, Any]) -> list[str]:
    """Notes on parts that work and could be better."""
    notes = []
    versions, processor, kernels = report["versions"], report["processor"], report["kernels"]
    if processor and processor["threads"] >= processor["cores"] > 1:
        notes.append(
            f"{processor['threads']} threads in every rank: with --ranks N set OMP_NUM_THREADS to "
            f"{processor['cores']} / N"
        )
    if kernels and kernels["extension"] != "loaded":
        notes.append(f"compiled kernels: {kernels['extension']}; every operator runs in plain torch")
    if kernels and kernels.get("npu_extension", "loaded") != "loaded":
        notes.append(
            f"NPU kernels: {kernels['npu_extension']}; on the NPU our operators run in plain torch (docs/ascend.md "
            "builds them)"
        )
    if kernels and "cuda" in kernels and kernels["triton"] != "loaded":
        notes.append(f"triton: {kernels['triton']}; the restricted loss runs in plain torch on cuda")
    if versions["torch-npu"] and report["devices"] and "npu" not in report["devices"]:
        notes.append(f"torch-npu {versions['torch-npu']} is installed but finds no device (CANN missing, or no driver)")
    notes += (report["megatron"] or {}).get("adapters_not_used", [])
    for device, operators in (report["operators"] or {}).items():
        if device.startswith("cpu instead"):
            notes.append(f"{len(operators)} operators run on the {device}: {', '.join(operators)}")
    return notes


def _disk(output: Path) -> dict[str, Any]:
    """The space on the file system that `output` is or will be on."""
    folder = next(path for path in [output.absolute(), *output.absolute().parents] if path.exists())
    usage = shutil.disk_usage(folder)
    return {"path": str(folder), "free_bytes": usage.free, "total_bytes": usage.total}


def _table(report: dict[str, Any]) -> dict[str, Any]:
    """The short values of the report for the table: bytes in GiB, absent packages as such."""
    apart = ("environment", "megatron", "operators")
    rows = {key: report[key] for key in ("versions", *PARTS, "disk") if key not in apart and report[key] is not None}
    rows["versions"] = {name: version or "not installed" for name, version in report["versions"].items()}
    return {key: _plain(key, value) for key, value in rows.items()}


def _lines(report: dict[str, Any]) -> list[str]:
    """The lines below the table: sentences, the verdict last."""
    parts = report["megatron"] or {}
    lines = [
        f"{key}: {', '.join(shim['name'] for shim in said) if key == 'shims' else said}"
        for key, said in parts.items()
        if key != "adapters_not_used"  # those are among the notes
    ]
    lines += [f"environment: {Finding(**found)}" for found in report["environment"] or []]
    return [*lines, *report["notes"], *report["problems"], report["verdict"]]


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner.removesuffix("_bytes"): _plain(inner, one) for inner, one in value.items()}
    if key.endswith("_bytes"):
        return f"{value / GIB:.1f} GiB"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return value
