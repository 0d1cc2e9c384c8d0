"""Checks of a run's output paths before it begins: a folder that refuses must cost a second, not the run.

The checks change nothing. `replace_file` writes a file whole or not at all.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from megatron_replay.errors import ConfigError


def check_folder(path: str | Path, key: str) -> None:
    """Raise ConfigError unless `path` is a folder that can be written, or could be made one."""
    stands = _standing(Path(path))
    if not stands.is_dir():
        raise ConfigError(f"{key}={path}: {stands} is a file, so there can be no folder; choose another place")
    if not os.access(stands, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key}={path}: {stands} cannot be written (no permission, or a read-only file system); choose another "
            "place"
        )


def check_file(path: str | Path, key: str) -> None:
    """Raise ConfigError unless `path` is a file that can be replaced, or could be made one."""
    if Path(path).is_dir():
        raise ConfigError(f"{key}={path}: this is a folder; name a file in it")
    check_folder(Path(path).parent, key)


def replace_file(path: Path, text: str) -> None:
    """Write the text (UTF-8) beside the file, then put it in its place. Raises OSError, and leaves the file then."""
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _standing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    absolute = path.absolute()
    return next(one for one in [absolute, *absolute.parents] if os.path.lexists(one))
