"""The check that a Hugging Face folder and a checkpoint are the same model: hash for hash, and logit for logit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_replay.config import Layout
from megatron_replay.device import CPU
from megatron_replay.errors import CheckpointError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.formats.torch_dist import Reader
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import Weight, split
from megatron_replay.parallel.batch import MicroBatch, flatten
from megatron_replay.parallel.mcore.model import Model, build, load_hf
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.ranks.world import World

SAMPLES, TOKENS = 2, 32
PADDED_TOLERANCE = 1e-4
"""The tolerance for padded heads, as a fraction of the largest logit.

Zero heads add exact zeros, but the longer sum may be added up in another order.
"""


@dataclass(frozen=True)
class Pair:
    """The two forms of a model that `convert` leaves.

    The weights are equal once both are cast to `dtype`, that of the form it made.
    """

    table: WeightTable
    """The table of the checkpoint; the folder holds its adapter merged."""
    folder: HFFolder
    reader: Reader
    dtype: torch.dtype

    def read(self, weight: Weight) -> Tensor:
        """A whole megatron tensor of the checkpoint, the adapter merged."""
        return self.reader.read_merged(weight, self.table)

    @property
    def size(self) -> int:
        """Bytes of the Hugging Face tensors."""
        return sum(math.prod(shape) for shape in self.table.hf_shapes.values()) * self.dtype.itemsize


def compare_tensors(pair: Pair, advance: Callable[[int], None]) -> int:
    """Compare the sha256 of every Hugging Face tensor; returns their number.

    CheckpointError names the first tensor that differs.
    """
    count = 0
    for weight in pair.table.base:
        for name, tensor in split(weight, pair.read(weight)).items():
            inside, outside = digest(tensor.to(pair.dtype)), digest(pair.folder.read(name).to(pair.dtype))
            if inside != outside:
                where = f"{outside[:12]} in {pair.folder.path}, {inside[:12]} in {pair.reader.folder}"
                raise CheckpointError(f"tensor {name!r} differs: sha256 {where}; convert again")
            advance(tensor.numel() * pair.dtype.itemsize)
            count += 1
    return count


def compare_logits(pair: Pair) -> tuple[float, int]:
    """(largest difference of the logits of both forms, positions compared), in fp32.

    The whole model is in memory, one form at a time. CheckpointError when the logits differ at all, or where heads are
    padded by more than rounding.
    """
    generator = np.random.default_rng(0)
    spec = pair.table.spec
    length = min(TOKENS, spec.max_positions)
    ids = [generator.integers(0, spec.vocab_size, length) for _ in range(SAMPLES)]
    batch = flatten(ids, [np.arange(length - 1)] * SAMPLES, SAMPLES * length, torch.device("cpu"))
    with world.running(Layout(), CPU) as alone:
        outside = _logits(pair, alone, Layout(), batch, lambda model: load_hf(model, pair.folder))
        padded = Layout(head_multiple=pair.table.head_multiple)
        inside = _logits(pair, alone, padded, batch, lambda model: _load(model, pair))
    difference = float((inside - outside).abs().max())
    allowed = PADDED_TOLERANCE * float(outside.abs().max()) if pair.table.has_padded_heads else 0.0
    if not difference <= allowed:
        raise CheckpointError(
            f"logits of {pair.folder.path} and {pair.reader.folder} differ by {difference:.3g}; convert again"
        )
    return difference, len(outside)


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes."""
    # numpy has no bfloat16: the bytes are taken as they are
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


@torch.no_grad()
def _logits(pair: Pair, alone: World, layout: Layout, batch: MicroBatch, fill: Callable[[Model], None]) -> Tensor:
    """Logits [N, V] of the batch's positions, of the model that `fill` fills."""
    model = build(pair.table.spec, layout, alone, torch.float32, seq_length=batch.tokens.shape[1])
    fill(model)
    for _, _, parameter in model.parameters():
        parameter.copy_(parameter.to(pair.dtype))
    found: list[Tensor] = []
    forward(model, [batch], lambda _, hidden, weight: hidden @ weight.t(), consume=lambda _, out: found.append(out))
    return found[0][:, : pair.table.spec.vocab_size]


@torch.no_grad()
def _load(model: Model, pair: Pair) -> None:
    for _, weight, parameter in model.parameters():
        parameter.copy_(pair.read(weight))
