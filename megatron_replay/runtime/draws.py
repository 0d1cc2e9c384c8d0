"""The samples drawn for a micro-batch, and the losses that their positions have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_replay.data.samples import Sample
from megatron_replay.parallel.batch import Term
from megatron_replay.parallel.losses import Loss
from megatron_replay.store import SampleSets


@dataclass(frozen=True)
class Part:
    """Positions of the samples of a micro-batch that have one loss."""

    name: str
    loss: Loss
    positions: Sequence[np.ndarray]
    """Those of each sample."""
    stored: Sequence[SampleSets] | None = None
    """The sets of each sample, where the run has them."""


@dataclass(frozen=True)
class Draw:
    """A micro-batch's samples, and their positions part by part."""

    samples: list[Sample]
    parts: tuple[Part, ...]

    def terms(self, scales: Mapping[str, float], *, has_head: bool) -> Iterator[Term]:
        """The parts as the micro-batch's terms. has_head: True where this rank computes losses and so needs sets."""
        start = 0
        for part in self.parts:
            stop = start + sum(map(len, part.positions))
            sets = part.loss.sets(part.stored) if has_head and part.stored is not None else None
            yield Term(part.name, slice(start, stop), scales.get(part.name, 1.0), sets)
            start = stop
