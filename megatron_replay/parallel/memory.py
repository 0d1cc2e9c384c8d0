"""The memory of a training run at its peak, rank by rank, from the model's shape and the configuration alone.

No tensor is made. The part that a rank holds all the time (weights, gradients, optimizer) is counted exactly. The part
that comes and goes is counted for the moments at which a step is largest. The largest of these is the peak. Activations
are those that autograd keeps of the layers as they are built here, and the loss gives the head's part.

Two numbers are estimates: gradients that live for a moment inside a layer, and copies while a checkpoint is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from megatron_replay.config import RunConfig
from megatron_replay.device import Device
from megatron_replay.models.layout import validate_layout
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import EMBEDDING, OUTPUT, Weight
from megatron_replay.optim import HIDDEN, OPTIMIZERS, Muon, half
from megatron_replay.parallel import activations
from megatron_replay.parallel.activations import FLOAT, LargestMicroBatch
from megatron_replay.parallel.losses import LOSSES
from megatron_replay.parallel.mcore.optimizer import kind_of
from megatron_replay.parallel.ranks.matrix_exchange import BATCH

BLOCK = 1 << 24
"""Elements that the plain-torch optimizers work on at a time on a device (`optim.blocks`)."""
WRITTEN = 0.4
"""The fraction of what a rank writes into a checkpoint that it holds a second time, without ZeRO-1.

Measured with megatron-core 0.16.1.
"""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of each rank of a pipeline stage when it holds most."""

    stage: int
    weights: int
    gradients: int
    optimizer: int
    """Moments and all other optimizer state of a parameter; fp32 main weights."""
    activations: int = 0
    head: int = 0
    """Output layer and loss, and the gradient of their weight where that is a tensor of its own."""
    passing: int = 0
    """Further needs of this moment: gradients inside a layer, the embedding's gradient, copies for an exchange."""
    base: int = 0
    """Memory of the process before it has a model; not known here."""
    moment: str = ""
    """The moment's name: backward, head, embedding, reduce, gather, update or checkpoint."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head + self.passing + self.base


def predict(
    spec: ModelSpec,
    config: RunConfig,
    *,
    ranks: int,
    dtype: torch.dtype,
    device: Device,
    largest: LargestMicroBatch | None = None,
) -> list[Peak]:
    """The peak of each pipeline stage's ranks, in order, in a run of `ranks` ranks, without that of the bare process.

    - dtype: that of the weights.
    - device: decides what an exchange copies; it need not be here.
    - largest: sizes of the data's micro-batches; when None the largest that the configuration allows.

    Raises LayoutError when the layout does not divide the model, ConfigError for an unknown optimizer or loss.
    """
    layout = config.layout
    split = validate_layout(spec, layout)
    replicas = max(1, ranks // (layout.tensor * layout.pipeline))
    run = _Run(spec, config, replicas, dtype, device, largest or largest_allowed(config, ranks))
    starts = [sum(split[:stage]) for stage in range(len(split))]
    return [
        run.peak(stage, range(start, start + layers))
        for stage, (start, layers) in enumerate(zip(starts, split, strict=True))
    ]


def largest_allowed(config: RunConfig, ranks: int) -> LargestMicroBatch:
    """The largest micro-batch that a configuration allows, for use where there are no data to look at."""
    tokens = config.data.seq_length * config.batch.micro
    chosen = config.train.store and config.collect.strategy in ("random", "bucket")
    positions = math.ceil(tokens * config.collect.fraction) if chosen else tokens
    candidates = positions * (config.collect.k_max + 1)
    return LargestMicroBatch(
        tokens=tokens, positions=positions, candidates=candidates, micro_batches=num_micro_batches(config, ranks)
    )


def num_micro_batches(config: RunConfig, ranks: int) -> int:
    """Micro-batches in a step of one replica."""
    replicas = max(1, ranks // (config.layout.tensor * config.layout.pipeline))
    return max(1, config.batch.total // (config.batch.micro * replicas))


@dataclass(frozen=True)
class _Run:
    spec: ModelSpec
    config: RunConfig
    replicas: int
    dtype: torch.dtype
    device: Device
    largest: LargestMicroBatch

    def peak(self, stage: int, layers: range) -> Peak:
        held = [weight for weight in self.table if self._here(weight, stage, layers)]
        trained = self.trained()
        moving = [weight for weight in held if weight.name in trained]
        always = Peak(
            stage=stage,
            weights=self.count(held) * self.dtype.itemsize,
            gradients=self.count(moving) * self.exact,
            optimizer=self.optimizer(moving),
        )
        moments = {**self.passes(stage, len(layers), moving), **self.exchanges(always, moving)}
        moment = max(moments, key=lambda name: sum(moments[name].values()))
        return replace(always, moment=moment, **moments[moment])

    @cached_property
    def table(self) -> WeightTable:
        adapter = self.config.adapter
        return WeightTable.of(self.spec, self.config.layout, adapter if adapter.rank else None)

    def trained(self) -> set[str]:
        """Names of the parameters that are trained."""
        if self.config.adapter.rank:
            return {weight.name for weight in self.table.factors}
        names, fraction = {weight.name: weight for weight in self.table}, self.config.train.freeze_share
        return set(names) - set(half(names.items(), fraction, self.config.seed) if fraction else ())

    def _here(self, weight: Weight, stage: int, layers: range) -> bool:
        last = stage == self.config.layout.pipeline - 1
        if weight.layer is not None:
            return weight.layer in layers
        if weight.name == EMBEDDING:  # a tied output layer on a stage of its own is a copy of it
            return stage == 0 or (last and self.spec.tied)
        return last

    def optimizer(self, moving: Iterable[Weight]) -> int:
        """State of the trained parameters, and fp32 main weights of bf16 ones; with ZeRO-1 this rank's part of it."""
        settings = self.config.optimizer
        kind, copies = (
            OPTIMIZERS.get(settings.name),
            int(self.dtype.itemsize < FLOAT) + bool(settings.options.get("pull")),
        )
        whole = sum(
            self.elements(weight) * self.exact * (len(kind.keys_of(kind_of(weight))) + copies) for weight in moving
        )
        return math.ceil(whole / self.replicas) if self.zero1 else whole

    def passes(self, stage: int, layers: int, moving: Iterable[Weight]) -> dict[str, dict[str, int]]:
        """The moments of the forward and backward passes, with the bytes each adds to those that are always held."""
        spec, layout, largest, size = self.spec, self.config.layout, self.largest, self.dtype.itemsize
        first, last = stage == 0, stage == layout.pipeline - 1
        names = {weight.name for weight in moving}
        here = activations.tokens_here(layout, largest.tokens)
        adapter = self.config.adapter
        plain = not adapter.rank
        layer = activations.layer(spec, layout, largest.tokens, size, norms_trained=plain)
        counted = -(-max(largest.positions, 1) // layout.tensor) * layout.tensor
        end = (
            activations.layer(spec, layout, largest.tokens, size, counted=counted, norms_trained=plain)
            if last
            else layer
        )
        received = not first and size < FLOAT and layout.recompute != "full"  # else a layer keeps it
        edges = here * spec.hidden_size * size * (int(not last) + int(received))
        low = len(adapter.targets) * largest.tokens * adapter.rank * size
        each = (layers - 1) * layer.kept + end.kept + layers * low + edges + largest.tokens * spec.head_dim * FLOAT
        flight = min(layout.pipeline - stage, largest.micro_batches)
        rows = spec.padded_vocab() // layout.tensor
        loss = LOSSES.get(self.config.train.loss)
        trained = (EMBEDDING if spec.tied else OUTPUT) in names
        dense = loss.dense_gradient and trained
        # for the embedding's own gradient
        waiting = rows * spec.hidden_size * size if dense and spec.tied and first and last else 0
        inside = (4 if plain else 8) * largest.tokens * (spec.ffn_size // layout.tensor) * size
        moments = {"backward": {"activations": flight * each, "head": waiting, "passing": layer.recomputed + inside}}
        if last:
            cpu = self.device.name == "cpu"
            moments["head"] = {
                "activations": flight * each
                + activations.norm(spec, activations.tokens_here(layout, counted), size, trained=plain),
                "head": loss.head_bytes(spec, largest, size, rows=rows, trained=trained, cpu=cpu),
            }
        if first and EMBEDDING in names:
            gradient = rows * spec.hidden_size * size
            moments["embedding"] = {"activations": (flight - 1) * each, "head": 2 * waiting, "passing": gradient}
        return moments

    def exchanges(self, always: Peak, moving: list[Weight]) -> dict[str, dict[str, int]]:
        """The moments after the passes."""
        cpu = self.device.name == "cpu"
        moments = {"update": 0 if cpu else 16 * min(BLOCK, max(map(self.elements, moving), default=0))}
        optimizer = OPTIMIZERS.get(self.config.optimizer.name)
        if issubclass(optimizer, Muon):  # matrices on their way to the rank that has them whole, and back
            hidden = self.count(weight for weight in moving if kind_of(weight) in HIDDEN)
            moments["update"] = 4 * len(optimizer.matrix_keys) * min(BATCH, hidden) * self.exact
        if self.device.backend == "gloo" and self.zero1:  # it reduces and gathers copies
            moments["reduce"], moments["gather"] = always.gradients, self.count(moving) * self.dtype.itemsize
        if self.config.train.save and cpu:
            # of parameter and two moments: gathered, taken apart, and this rank's part
            whole = 3 * FLOAT * self.count(moving)
            moments["checkpoint"] = (
                math.ceil(whole * (2 + 1 / self.replicas))
                if self.zero1
                else int(WRITTEN * (always.weights + always.optimizer))
            )
        return {name: {"passing": size} for name, size in moments.items()}

    def elements(self, weight: Weight) -> int:
        """Elements of one tensor rank's part of a weight."""
        return math.prod(weight.shape) // (1 if weight.axis is None else self.config.layout.tensor)

    def count(self, some: Iterable[Weight]) -> int:
        return sum(map(self.elements, some))

    @property
    def zero1(self) -> bool:
        return self.config.layout.zero1 and self.dtype != torch.float64

    @property
    def exact(self) -> int:
        """Bytes of a number that is summed up."""
        return max(self.dtype.itemsize, FLOAT)
