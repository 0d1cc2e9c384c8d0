"""Versions of megatron-core: the imported one, the one that would be imported, and ranges of them."""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
from pathlib import Path


def megatron_version() -> str:
    """The version of the megatron-core that is imported, which may differ from the one pip knows."""
    return str(importlib.import_module("megatron.core").__version__)


def importable_version() -> str | None:
    """The version of the megatron-core that would be imported; None where there is none. Imports nothing.

    The package itself is asked, because a checkout has no metadata.
    """
    spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
    if spec is None or spec.origin is None:
        return None
    info = Path(spec.origin).with_name("package_info.py")
    return str(runpy.run_path(str(info))["__version__"]) if info.is_file() else None


def within(version: str, versions: str) -> bool:
    """True for a version in a range such as ">=0.12,<0.15"; the first two numbers count."""
    low, high = (minor(bound) for bound in versions.split(","))
    return low <= minor(version) < high


def minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version or of a bound of a range: (0, 12) of "0.12.1"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
