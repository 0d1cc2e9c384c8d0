"""A generator that makes the next step's batch while the device works on this one's."""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(make: Callable[[int], T], first: int, stop: int) -> Generator[T]:
    """make(first), ..., make(stop - 1), each made on one other thread while the caller has the one before.

    An error of `make` is raised by `next`. Close the generator to end early.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        coming = pool.submit(make, first) if first < stop else None
        for following in range(first + 1, stop + 1):
            assert coming is not None
            made = coming.result()
            coming = pool.submit(make, following) if following < stop else None
            yield made
