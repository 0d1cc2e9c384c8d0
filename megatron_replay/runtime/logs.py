"""The logs of a training run: Megatron's console line, metrics.jsonl, TensorBoard, and the resolved configuration.

The main rank writes them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_replay import __version__
from megatron_replay.config import dump
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.trainer import StepResult
from megatron_replay.runtime.session import Session


class Logs:
    """Use as a context; call `step` after each iteration."""

    def __init__(self, session: Session, steps: int, loss_name: str) -> None:
        self.session, self.steps, self.loss_name = session, steps, loss_name
        self.folder = Path(session.config.output)
        self.file: Any = None
        self.board: Any = None

    def __enter__(self) -> Logs:
        if self.session.world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(
                f"# megatron_replay {__version__}\n{dump(self.session.config)}", encoding="utf-8"
            )
            self.file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
            if self.session.config.train.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in (self.file, self.board):
            if sink is not None:
                sink.close()

    def step(
        self, iteration: int, result: StepResult, lr: float, seconds: float, batches: Sequence[MicroBatch], skipped: int
    ) -> None:
        """Every rank calls it, since the tokens of all replicas are added up; the main rank writes."""
        here = sum(len(sample) for batch in batches for sample in batch.samples)
        tokens, shared = self.session.world.total(here, sum(batch.shared for batch in batches))
        if not self.session.world.is_main:
            return
        values = {
            self.loss_name: result.loss,
            "grad-norm": result.grad_norm,
            "learning-rate": lr,
            "iteration-time": seconds,
            "tokens-per-sec": tokens / seconds,
            "replay/positions": result.positions,
            "replay/tokens": int(tokens),
            "replay/shared_tokens": int(shared),
            **result.metrics,
            **{f"time/{phase}": spent for phase, spent in result.seconds.items()},
        }
        self._write(iteration, values)
        if iteration % self.session.config.train.log_interval == 0 or iteration == self.steps:
            print(self._line(iteration, result, lr, seconds, skipped), flush=True)

    def _write(self, iteration: int, values: dict[str, float]) -> None:
        self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, iteration)

    def _line(self, iteration: int, result: StepResult, lr: float, seconds: float, skipped: int) -> str:
        """Megatron's line, field for field, so that its log parsers work; ours follow at the end."""
        batch = self.session.config.batch.total
        nan = 0 if result.applied else 1
        ours = "".join(f" {_spoken(name)}: {value:.3f} |" for name, value in result.metrics.items())
        return (
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{self.steps:8d} |"
            f" consumed samples: {iteration * batch:12d} | elapsed time per iteration (ms): {seconds * 1000:.1f} |"
            f" learning rate: {lr:.6E} | global batch size: {batch:5d} |"
            f" {self.loss_name}: {result.loss:.6E} | loss scale: 1.0 | grad norm: {result.grad_norm:.3f} |"
            f" number of skipped iterations: {skipped:3d} | number of nan iterations: {nan:3d} |{ours}"
        )


def _spoken(name: str) -> str:
    """A metric's name in the line: without the part that names its origin, but for terms of the loss."""
    origin, _, rest = name.rpartition("/")
    return (f"{origin} {rest}" if rest in ("kl", "nll") else rest).replace("_", " ")
