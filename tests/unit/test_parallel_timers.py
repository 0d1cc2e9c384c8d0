"""The phases of a step by a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from megatron_replay.device import Device
from megatron_replay.parallel.timers import PHASES, Timers


@dataclass(frozen=True)
class Clock(Device):
    """A device whose time passes only when the test says so."""

    now: list[float]

    def instant(self) -> Any:
        return self.now[0]

    def pass_(self, seconds: float) -> None:
        self.now[0] += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock("cpu", "gloo", has_bf16=False, has_fp64=True, now=[100.0])


def seconds(timers: Timers) -> dict[str, float]:
    return {name: spent for name, spent in zip(PHASES, timers.take(), strict=True) if spent}


def test_a_phase_does_not_count_what_is_inside_another(clock: Clock) -> None:
    timers = Timers(clock)
    with timers.phase("forward"):
        clock.pass_(1)
        with timers.phase("head"):
            clock.pass_(2)
        clock.pass_(4)
    clock.pass_(8)  # in no phase
    with timers.phase("optimizer"):
        clock.pass_(16)
    assert seconds(timers) == {"forward": 5, "head": 2, "optimizer": 16}
    clock.pass_(32)
    assert seconds(timers) == {}, "told once"


def test_megatrons_timers_are_phases_of_ours(clock: Clock) -> None:
    timers = Timers(clock)
    timers("forward-backward", log_level=1).start(barrier=True)
    for name in (
        "forward-compute",
        "forward-send-backward-recv",
        "backward-compute",
        "backward-compute",
        "all-grads-sync",
    ):
        timers(name, log_level=2).start()
        clock.pass_(1)
        timers(name).stop()
    timers("forward-backward").stop()
    assert seconds(timers) == {"forward": 1, "pipeline": 1, "backward": 2, "reduce": 1}


def test_a_phase_ends_with_an_error(clock: Clock) -> None:
    timers = Timers(clock)
    with pytest.raises(ValueError), timers.phase("data"):
        clock.pass_(1)
        raise ValueError
    clock.pass_(1)
    assert seconds(timers) == {"data": 1}
