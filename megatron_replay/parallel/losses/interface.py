"""The interface of a loss, and the registry of all losses.

N positions of a micro-batch, H hidden, V vocabulary rows here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from megatron_replay.models.spec import ModelSpec
from megatron_replay.ops import LocalSets
from megatron_replay.parallel.activations import LargestMicroBatch
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.registry import Registry
from megatron_replay.store import SampleSets

LOSSES: Registry[Loss] = Registry("train.loss")
"""Every loss of this package, by the name a configuration uses."""


class Loss(ABC):
    """A loss of a run on this rank. The object itself is the task of the head (`parallel.batch.Task`).

    The class answers what must be known before there is a model; an object belongs to a model.
    """

    needs_sets: ClassVar[bool] = False
    """True where it takes candidate sets, so that a run needs a store."""
    needs_logits: ClassVar[bool] = False
    """True where the store must hold the base model's logits of the candidates."""
    dense_gradient: ClassVar[bool] = True
    """True where the gradient of the head's weight is a tensor of its own, as large as the weight."""
    log_name: ClassVar[str] = "lm loss"
    """The name of its value in the log; megatron's, which parsers of its logs look for."""

    def __init__(self, model: Model, vocab_size: int, kernels: str = "auto") -> None:
        """vocab_size: the real vocabulary; rows from there on are padding."""
        self.model, self.vocab_size, self.kernels = model, vocab_size, kernels
        self.shard = vocab_shard(model)

    @abstractmethod
    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        """The loss of each position, [N], from hidden [N, H] and weight [V, H]."""

    def sets(self, stored: Sequence[SampleSets]) -> LocalSets | None:
        """The `MicroBatch.sets` of samples with these stored sets.

        It is called on the loader's thread, on ranks with a head.
        """
        return None

    def metrics(self, batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Further numbers of a step's micro-batches for the log, the same on every rank.

        It may communicate, so every rank calls it.
        """
        return {}

    @classmethod
    @abstractmethod
    def head_bytes(
        cls, spec: ModelSpec, largest: LargestMicroBatch, itemsize: int, *, rows: int, trained: bool, cpu: bool
    ) -> int:
        """Memory of the head and the loss at their peak, forward and backward.

        - itemsize: bytes of a weight.
        - rows: V.
        - trained: True where the head's weight is trained.
        - cpu: True where the device is the cpu.
        """
