"""Seconds of each phase of a training step, measured without waiting for the device.

A phase counts its own time without that of a phase inside it, so the phases of one rank add up to its step. On a device
an instant is an event in its queue. The seconds between two are read when the step's result is exchanged, where every
rank waits anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from megatron_replay.device import Device

PHASES = {
    "data": "the micro-batches: reading the store, laying out rows",
    "forward": "the layers",
    "head": "the loss operator's forward pass: candidate logits and, in the same operator, its two small collectives",
    "loss": "the sum over positions",
    "backward": "all of it, the head's included; with recomputation the layers' second forward pass too",
    "pipeline": "sending to neighbouring stages, and waiting for them",
    "reduce": "summing gradients: over the replicas, of norms over the tensor ranks, of a tied embedding over its two "
    "stages",
    "optimizer": "statistics, their exchange, the update, and under ZeRO-1 the gather of the parameters",
    "checkpoint": "the save after the step before",
}


class Timers:
    """Timers of the phases: `with timers.phase("data"): ...`.

    megatron's schedules call an object of this class as they call megatron's own timers (`config.timers`).
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.traced = False
        """True while a profiler records; it then sees the phases as `time/data` and so on."""
        self._open: list[tuple[str, AbstractContextManager[Any] | None]] = []
        self._turns: list[tuple[Any, str | None]] = []
        """Instants, and the phase that each begins or returns to."""

    def __call__(self, name: str, log_level: int | None = None) -> _Stopwatch:
        return _Stopwatch(self, _phase_of(name))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        seen = torch.profiler.record_function(f"time/{name}") if self.traced else None
        if seen is not None:
            seen.__enter__()
        self._open.append((name, seen))
        self._turns.append((self.device.instant(), name))

    def end(self) -> None:
        _, seen = self._open.pop()
        self._turns.append((self.device.instant(), self._open[-1][0] if self._open else None))
        if seen is not None:
            seen.__exit__(None, None, None)

    def take(self) -> list[float]:
        """Seconds of each of PHASES since the last call, in their order. Waits until the device has come this far."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for (moment, name), (later, _) in zip(self._turns, self._turns[1:], strict=False):
            if name is not None:
                seconds[name] += self.device.seconds(moment, later)
        self._turns.clear()
        return list(seconds.values())


class _Stopwatch:
    """The object that megatron starts and stops in place of its own timers."""

    def __init__(self, timers: Timers, phase: str | None) -> None:
        self.timers, self.phase = timers, phase

    def start(self, barrier: bool = False) -> None:
        """barrier: megatron would have all ranks wait for each other here, which timing must not."""
        if self.phase is not None:
            self.timers.begin(self.phase)

    def stop(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.timers.end()


def _phase_of(name: str) -> str | None:
    """The phase of one of megatron's timers; None for one that covers several."""
    if name in ("forward-compute", "backward-compute"):
        return name.removesuffix("-compute")
    if name.endswith(("-send", "-recv")):
        return "pipeline"
    return "reduce" if name.endswith(("-grads-sync", "-grads-all-reduce")) else None
