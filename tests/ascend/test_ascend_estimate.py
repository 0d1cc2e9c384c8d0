"""The estimate is the slowest pipe of the slowest core."""

from __future__ import annotations

import pytest
from estimate import kernel_seconds, pipe_seconds
from stand_in import COUNTERS


def test_by_hand() -> None:
    idle = dict.fromkeys(COUNTERS, 0)
    moving = {**idle, "mte2": 10, "mte2_bytes": 4_000_000}
    both = {**idle, "mte2_bytes": 4_000_000, "mte3_bytes": 2_000_000}
    computing = {**idle, "v": 100, "repeats": 200_000, "s": 50, "scalar_waits": 2}
    assert pipe_seconds(moving)["mte2"] == pytest.approx(4e6 / 40e9 + 320 / 1.8e9)
    assert kernel_seconds([both]) == pytest.approx(6e6 / 40e9)
    assert pipe_seconds(computing)["v"] == pytest.approx((200_000 + 1600) / 1.8e9)
    assert pipe_seconds(computing)["s"] == pytest.approx(200 / 1.8e9 + 1e-6)
    assert kernel_seconds([idle, moving, computing]) == pytest.approx(201_600 / 1.8e9)
    assert kernel_seconds([]) == 0
