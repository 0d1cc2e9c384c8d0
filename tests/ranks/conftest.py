"""Standing pools of gloo ranks, one a size for the whole session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Pool]]:
    """`ranks(4).run(function, *args)` calls a module-level function on four standing gloo ranks."""
    pools: dict[int, Pool] = {}

    def of(size: int) -> Pool:
        return pools.setdefault(size, Pool(size))

    yield of
    for pool in pools.values():
        pool.close()
