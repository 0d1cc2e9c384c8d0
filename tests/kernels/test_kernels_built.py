"""A compiler that is there must have been used."""

from __future__ import annotations

import shutil

import pytest

from megatron_replay.kernels import library


def test_where_there_is_a_compiler_the_extension_is_built() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert library.EXTENSION == "loaded", (
        "make venv, or pip install --no-deps --no-build-isolation -e . and read its warnings"
    )
