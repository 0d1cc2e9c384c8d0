"""The extensions of compiled kernels, which register themselves with torch when they are loaded, and the choice whether
to use them."""

from __future__ import annotations

import importlib
from typing import Literal, get_args

from megatron_replay.errors import ConfigError
from megatron_replay.registry import nearest

NPU = "_npu"
"""The extension with the NPU's kernels; the other one has the CPU's."""

Mode = Literal["auto", "reference"]
"""auto: compiled kernels where they are live; reference: plain torch."""


def check_mode(mode: str) -> None:
    """Raise ConfigError, with the nearest name, unless `mode` is one."""
    if mode not in get_args(Mode):
        raise ConfigError(
            f"unknown kernels {mode!r}; {nearest(str(mode), get_args(Mode), otherwise='choose auto or reference')}"
        )


def load(extension: str = "_C") -> str:
    """Load the kernels, once torch is imported (the NPU's: torch-npu): "loaded", or why not ("not built", "cannot be
    loaded: ...")."""
    try:
        importlib.import_module(f"megatron_replay.{extension}")
    except ModuleNotFoundError:
        return "not built"
    except ImportError as err:  # built for another torch
        return f"cannot be loaded: {err}"
    return "loaded"
