"""The operators on CUDA tensors: Triton's, imported when the first such tensor comes, or plain torch without Triton."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)


def call(operator: str, *args: Any) -> Any:
    """The operator on CUDA tensors."""
    return getattr(_source(), operator)(*args)


@cache
def triton() -> str:
    """Import Triton's kernels: "loaded", or why they cannot be had ("not installed", "cannot be loaded: ...")."""
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        importlib.import_module("megatron_replay.kernels.triton_launch")
    except (ImportError, OSError, AttributeError) as err:  # a Triton of another age, or without its libraries
        return f"cannot be loaded: {err}"
    return "loaded"


@cache
def _source() -> ModuleType:
    if triton() == "loaded":
        return importlib.import_module("megatron_replay.kernels.triton_launch")
    log.warning("triton %s: the restricted loss runs in plain torch on cuda", triton())
    return importlib.import_module("megatron_replay.kernels.torch_twins")
