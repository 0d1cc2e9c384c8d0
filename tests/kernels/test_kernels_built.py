"""A compiler that is there must have been used."""

from __future__ import annotations

import shutil

import pytest

from megatron_replay.optim import kernels


def test_where_there_is_a_compiler_the_extension_is_built() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert kernels.EXTENSION == "loaded", (
        "make venv, or pip install --no-deps --no-build-isolation -e . and read its warnings"
    )
