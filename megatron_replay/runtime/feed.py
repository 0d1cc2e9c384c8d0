"""The micro-batches of training, step by step, from samples, their stored candidate sets and the batch settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_replay.data.packing import Grouping, Stream, rank_micro_batches
from megatron_replay.data.samples import Sample
from megatron_replay.errors import DataError
from megatron_replay.optim import learning_rate
from megatron_replay.parallel.activations import LargestMicroBatch
from megatron_replay.parallel.batch import MicroBatch, micro_batches, row_length
from megatron_replay.parallel.losses import Loss
from megatron_replay.parallel.memory import num_micro_batches
from megatron_replay.runtime.session import Session
from megatron_replay.store import CandidateStore


@dataclass
class Feed:
    """Step -> this replica's micro-batches: a pure function of the step, so resuming needs the step number alone."""

    session: Session
    samples: list[Sample]
    store: CandidateStore | None
    loss: Loss

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
        rows = rank_micro_batches(self.stream.batch(step), world.data_rank, world.data_size, config.batch.micro)
        chosen = [[self.samples[i] for row in micro for i in row] for micro in rows]
        stored = None if self.store is None else [[self.store[sample.uid] for sample in some] for some in chosen]
        batches = micro_batches(
            [[s.ids for s in some] for some in chosen],
            [[s.positions for s in some] for some in (stored or chosen)],
            world.torch_device,
            multiple=world.tensor_size,
            share_prefixes=config.data.share_prefixes,
        )
        batches = [replace(batch, samples=some) for batch, some in zip(batches, chosen, strict=True)]
        if stored is None or self.session.model.head is None:
            return batches
        return [replace(batch, sets=self.loss.sets(some)) for batch, some in zip(batches, stored, strict=True)]

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
        return LargestMicroBatch(
            tokens=length,
            positions=positions,
            candidates=candidates,
            micro_batches=num_micro_batches(config, world.size),
        )

    def describe(self) -> str:
        positions = sum(map(self._num_positions, self.samples))
        rows = len(self.stream.rows(0))
        return (
            f"{len(self.samples)} samples in {rows} rows of up to {self.session.config.data.seq_length} tokens, "
            f"{positions} positions an epoch; {self.steps} steps of {self.session.config.batch.total} rows"
            + (f"; {self.left_out} more samples have no position to train on and are left out" if self.left_out else "")
        )

    def _num_positions(self, sample: Sample) -> int:
        return len(sample.positions) if self.store is None else self.store.num_positions(sample.uid)
