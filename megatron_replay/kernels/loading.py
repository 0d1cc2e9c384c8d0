"""Loading the extensions of compiled kernels, and the mode that says whether to use them."""

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
    """Load an extension, which registers its kernels with torch: "loaded", or the reason why it is not.

    The reasons are "not built" and "cannot be loaded: ...". torch must be imported before, and torch-npu for the NPU's.
    """
    try:
        importlib.import_module(f"megatron_replay.{extension}")
    except ModuleNotFoundError:
        return "not built"
    except ImportError as err:  # built for another torch
        return f"cannot be loaded: {err}"
    return "loaded"
