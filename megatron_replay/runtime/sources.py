"""Several files under one key, each measured apart: how they are named, and how their results are put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_replay.errors import ConfigError

Result = dict[str, Any]


def named(value: str | Mapping[str, str], key: str) -> dict[str, Path]:
    """{name: path} of a key's value: paths separated by commas, named by their stems, or a mapping that names them.

    Raises ConfigError for a name that stands for two paths.
    """
    if isinstance(value, Mapping):
        return {name: Path(path) for name, path in value.items() if path}
    found: dict[str, Path] = {}
    for path in (Path(part.strip()) for part in value.split(",") if part.strip()):
        if path.stem in found:
            raise ConfigError(
                f"{key}: {found[path.stem]} and {path} are both named {path.stem!r}; name them: {key}.NAME=FILE"
            )
        found[path.stem] = path
    return found


def each(value: str | Mapping[str, str], key: str, measure: Callable[[Path], Result]) -> Result:
    """The measure of the only path that is not named by hand, or {name: its measure}."""
    sources = named(value, key)
    if isinstance(value, str) and len(sources) == 1:
        return measure(next(iter(sources.values())))
    return {name: measure(path) for name, path in sources.items()}
