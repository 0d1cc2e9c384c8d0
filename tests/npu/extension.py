"""A compiled megatron_replay._npu from anywhere, as if it had been built into the package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys

NAME = "megatron_replay._npu"


def load(path: str) -> None:
    """Before the package is imported; torch-npu first, whose library it is linked to."""
    import torch_npu  # noqa: F401

    loader = importlib.machinery.ExtensionFileLoader(NAME, path)
    spec = importlib.util.spec_from_loader(NAME, loader)
    assert spec is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    loader.exec_module(sys.modules[NAME])
