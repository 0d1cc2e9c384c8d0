"""The extension of compiled kernels, which registers itself with torch when it is loaded, and the choice whether to use it."""

from __future__ import annotations

import importlib
from typing import Literal, get_args

from megatron_replay.errors import ConfigError
from megatron_replay.registry import nearest

Mode = Literal["auto", "reference"]
"""auto: compiled kernels where they are live; reference: plain torch."""


def check_mode(mode: str) -> None:
    """Raise ConfigError, with the nearest name, unless `mode` is one."""
    if mode not in get_args(Mode):
        raise ConfigError(f"unknown kernels {mode!r}; {nearest(str(mode), get_args(Mode), otherwise='choose auto or reference')}")


def load() -> str:
    """Load the kernels, once torch is imported: "loaded", or why they cannot be had ("not built", "cannot be loaded: ...")."""
    try:
        importlib.import_module("megatron_replay._C")
    except ModuleNotFoundError:
        return "not built"
    except ImportError as err:  # built for another torch
        return f"cannot be loaded: {err}"
    return "loaded"
