"""The memory of losses over sets that need the full logits of some positions too."""

from __future__ import annotations

from megatron_replay.models.spec import ModelSpec
from megatron_replay.parallel.activations import LargestMicroBatch
from megatron_replay.parallel.losses.full import Full
from megatron_replay.parallel.losses.restricted import Restricted


class BesideFull(Restricted):
    """A loss over sets, and over the full logits of a chunk of positions at a time."""

    dense_gradient = True

    @classmethod
    def head_bytes(
        cls, spec: ModelSpec, largest: LargestMicroBatch, itemsize: int, *, rows: int, trained: bool, cpu: bool
    ) -> int:
        """The sparse part, and the full logits of a chunk."""
        return sum(
            loss.head_bytes(spec, largest, itemsize, rows=rows, trained=trained, cpu=cpu) for loss in (Restricted, Full)
        )
