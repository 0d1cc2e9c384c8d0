"""Fixtures of the tests of compiled code, which are skipped, with the reason, where the extension is not built."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_replay.kernels import library


@pytest.fixture
def compiled() -> None:
    if library.EXTENSION != "loaded":
        pytest.skip(f"compiled kernels: {library.EXTENSION}")


@pytest.fixture
def with_isa(compiled: None) -> Iterator[Callable[[str], bool]]:
    """`with_isa("avx2")`: use that instruction set until the test ends; False where this processor lacks it."""
    from megatron_replay import _C

    before = _C.isa()
    yield _C.use_isa
    _C.use_isa(before)


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
