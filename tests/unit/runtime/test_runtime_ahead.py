"""One batch is made ahead, never more, in order, and what goes wrong is told where the batch is taken."""

from __future__ import annotations

import threading

import pytest

from megatron_replay.runtime.ahead import ahead


def test_in_order_and_one_ahead_on_another_thread() -> None:
    made: list[int] = []
    threads: set[str] = set()
    second = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        threads.add(threading.current_thread().name)
        if step == 4:
            second.set()
        return 10 * step

    feeding = ahead(make, 3, 6)
    assert next(feeding) == 30
    assert second.wait(5), "the next one is made while the caller works"
    assert made == [3, 4]
    assert list(feeding) == [40, 50] and made == [3, 4, 5]
    assert len(threads) == 1 and threading.current_thread().name not in threads


def test_nothing_to_make() -> None:
    assert list(ahead(lambda step: step, 5, 5)) == []


def test_what_is_raised_comes_with_its_step() -> None:
    def make(step: int) -> int:
        if step == 1:
            raise ValueError("step 1 cannot be made")
        return step

    feeding = ahead(make, 0, 3)
    assert next(feeding) == 0
    with pytest.raises(ValueError, match="step 1"):
        next(feeding)


def test_closing_it_ends_the_thread() -> None:
    before = threading.active_count()
    feeding = ahead(lambda step: step, 0, 10)
    next(feeding)
    feeding.close()
    assert threading.active_count() == before
