"""SIGTERM and SIGINT ask the loop to stop after the current step; a second one stops at once.

All ranks agree on the step.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_replay.parallel.ranks.world import World


class StopRequest:
    def __init__(self, world: World) -> None:
        self._world = world
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> int:
        """The signal any rank received, 0 when none did; the same on every rank."""
        return int(max(float(x) for x in self._world.gather(torch.tensor([float(self._received)]))))

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number
