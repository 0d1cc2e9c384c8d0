"""The micro-batches of training, step by step, from samples, their stored candidate sets and the batch settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_replay.data.packing import Grouping, Stream, rank_micro_batches
from megatron_replay.data.samples import Sample
from megatron_replay.errors import DataError
from megatron_replay.optim import learning_rate
from megatron_replay.parallel.activations import LargestMicroBatch
from megatron_replay.parallel.batch import DOMAIN, MicroBatch, Task, micro_batches, row_length
from megatron_replay.parallel.losses import Loss
from megatron_replay.parallel.memory import num_micro_batches
from megatron_replay.parallel.mixture import Mixture
from megatron_replay.runtime.draws import Draw, Part
from megatron_replay.runtime.rehearsal import Rehearsal
from megatron_replay.runtime.session import Session
from megatron_replay.store import CandidateStore


@dataclass
class Feed:
    """Step -> this replica's micro-batches: a pure function of the step, so resuming needs the step number alone."""

    session: Session
    samples: list[Sample]
    store: CandidateStore | None
    loss: Loss
    rehearsal: Rehearsal | None = None

    def __post_init__(self) -> None:
        data, batch = self.session.config.data, self.session.config.batch
        found = len(self.samples)
        self.samples = [sample for sample in self.samples if self._num_positions(sample)]
        self.left_out = found - len(self.samples)
        if not self.samples:
            raise DataError(
                f"none of the {found} samples has a position to train on; check data.path and how the store was "
                "collected"
            )
        lengths = [len(sample) for sample in self.samples]
        grouping = Grouping([sample.ids for sample in self.samples], data.seq_length) if data.group_prefixes else None
        self.stream = Stream(
            lengths, self.session.config.seed, data.seq_length, data.packing, data.shuffle, batch.total, grouping
        )
        if self.rehearsal is not None:
            row = min(data.seq_length, sum(lengths) / len(self.stream.rows(0)))  # shared tokens count once
            self.rehearsal.plan(row * batch.total, self.session.world.data_size)

    @property
    def task(self) -> Task:
        """The task of the micro-batches."""
        if self.rehearsal is None:
            return self.loss
        return Mixture({DOMAIN: self.loss, **dict.fromkeys(self.rehearsal.weights, self.rehearsal.loss)})

    @cached_property
    def steps(self) -> int:
        train = self.session.config.train
        return train.iters or self.stream.num_steps(train.epochs)

    def rate(self, step: int) -> float:
        """The learning rate of a step; raises ConfigError for a schedule that does not fit the number of steps."""
        schedule, peak = self.session.config.schedule, self.session.config.optimizer.lr
        return learning_rate(
            step,
            peak=peak,
            minimum=min(schedule.min_lr, peak),
            warmup=schedule.warmup_iters,
            total=self.steps,
            style=schedule.style,
        )

    def micro_batches(self, step: int) -> list[MicroBatch]:
        world, config = self.session.world, self.session.config
        rows = self.stream.batch(step)
        dealt = rank_micro_batches(rows, world.data_rank, world.data_size, config.batch.micro)
        draws = [self._draw([self.samples[i] for row in micro for i in row]) for micro in dealt]
        scales = {}
        if self.rehearsal is not None:
            draws = self.rehearsal.mixed(step, draws, world, capacity=config.data.seq_length * config.batch.micro)
            scales = self._scales(step, [self.samples[i] for row in rows for i in row])
        batches = micro_batches(
            [[s.ids for s in draw.samples] for draw in draws],
            [draw.parts[0].positions for draw in draws],
            world.torch_device,
            multiple=world.tensor_size,
            share_prefixes=config.data.share_prefixes,
            further=[[p for part in draw.parts[1:] for p in part.positions] for draw in draws],
        )
        batches = [replace(batch, samples=draw.samples) for batch, draw in zip(batches, draws, strict=True)]
        has_head = self.session.model.head is not None
        terms = [tuple(draw.terms(scales, has_head=has_head)) for draw in draws]
        if self.rehearsal is None:
            return [replace(batch, sets=term.sets) for batch, (term,) in zip(batches, terms, strict=True)]
        return [replace(batch, terms=some) for batch, some in zip(batches, terms, strict=True)]

    def _draw(self, some: list[Sample]) -> Draw:
        """A micro-batch of the domain."""
        stored = None if self.store is None else [self.store[sample.uid] for sample in some]
        return Draw(some, (Part(DOMAIN, self.loss, [s.positions for s in stored or some], stored),))

    def _scales(self, step: int, drawn: Sequence[Sample]) -> dict[str, float]:
        """The factor of each term's losses, for their mean over all positions of the step to be the loss.

        The loss is the sum of each term's mean times its weight.
        """
        assert self.rehearsal is not None
        counts = {DOMAIN: sum(map(self._num_positions, drawn)), **self.rehearsal.counts(step, drawn)}
        weights = {DOMAIN: 1.0, **self.rehearsal.weights}
        total = sum(counts.values())
        return {name: weights[name] * total / count for name, count in counts.items() if count}

    def largest(self) -> LargestMicroBatch:
        """Sizes that no micro-batch of the first epoch exceeds."""
        config, world = self.session.config, self.session.world
        rows = self.stream.rows(0)
        tokens = max(sum(len(self.samples[i]) for i in row) for row in rows) * config.batch.micro
        positions = max(sum(self._num_positions(self.samples[i]) for i in row) for row in rows) * config.batch.micro
        counts = self.store.manifest.counts if self.store else {}
        candidates = math.ceil(positions * counts["ids"] / max(1, counts["positions"])) if counts else 0
        # shared tokens count once
        length = row_length([min(tokens, config.data.seq_length * config.batch.micro)], world.tensor_size)
        largest = LargestMicroBatch(
            tokens=length,
            positions=positions,
            candidates=candidates,
            micro_batches=num_micro_batches(config, world.size),
        )
        return largest if self.rehearsal is None else self.rehearsal.largest(largest, world.data_size)

    def describe(self) -> str:
        positions = sum(map(self._num_positions, self.samples))
        rows = len(self.stream.rows(0))
        return (
            f"{len(self.samples)} samples in {rows} rows of up to {self.session.config.data.seq_length} tokens, "
            f"{positions} positions an epoch; {self.steps} steps of {self.session.config.batch.total} rows"
            + (f"; {self.left_out} more samples have no position to train on and are left out" if self.left_out else "")
            + (f"; {self.rehearsal.describe()}" if self.rehearsal else "")
        )

    def _num_positions(self, sample: Sample) -> int:
        return len(sample.positions) if self.store is None else self.store.num_positions(sample.uid)
