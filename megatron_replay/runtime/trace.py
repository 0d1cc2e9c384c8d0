"""A chrome trace of a few training steps, one file a rank.

It holds the events of torch's profiler, and our phases as `time/...`.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_replay.errors import ConfigError
from megatron_replay.parallel.timers import Timers
from megatron_replay.runtime.session import Session


class Trace:
    """Use as a context and call `step` before each iteration; without `train.profile` it does nothing.

    Raises ConfigError when the run has fewer steps left than the window asks for.
    """

    def __init__(self, session: Session, timers: Timers, steps: int) -> None:
        self.session, self.timers = session, timers
        self.window = session.config.train.profile
        self.begun = 0
        self.profiler: Any = None
        if self.window and self.window[1] > steps:
            raise ConfigError(
                f"train.profile={list(self.window)}: this run has {steps} steps; name a first and a last step among "
                "these, or leave it out"
            )

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.profiler is not None:
            self._write()

    def step(self) -> None:
        """Note that a step begins."""
        self.begun += 1
        if not self.window:
            return
        if self.begun == self.window[0]:
            self.profiler, self.timers.traced = self.session.world.device.profiler(), True
            self.profiler.start()
        elif self.begun == self.window[1] + 1:
            self._write()

    def _write(self) -> None:
        self.profiler.stop()
        folder = Path(self.session.config.output) / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / f"rank{self.session.world.rank}.json"))
        self.profiler, self.timers.traced = None, False
        self.session.say(
            f"  wrote a trace of steps {self.window[0]} to {min(self.begun, self.window[1])} to {folder}, one file a "
            "rank"
        )
