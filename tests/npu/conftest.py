"""The real torch-npu over a runtime that has memory only (csrc/ascend/sim), in child processes: level L2 of
docs/ascend.md."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import runtime as npu_runtime


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> npu_runtime.Runtime:
    return npu_runtime.make(tmp_path_factory.mktemp("memory-only-cann"))


@pytest.fixture(scope="session")
def on_npu(runtime: npu_runtime.Runtime) -> Any:
    """Stage 0 and training on npu:0, our operators in plain torch."""
    return runtime.run("step", "npu", "fp32,bf16", "", "")
