"""The memory table of `train --dry-run`: the predicted peak of a rank of each pipeline stage, by what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_replay.parallel.activations import LargestMicroBatch
from megatron_replay.parallel.memory import Peak, predict
from megatron_replay.runtime.session import Session

LOADED = 20_000_000
"""Bytes of code and tables that the first step loads, on the cpu; measured."""
COLUMNS = ("weights", "gradients", "optimizer", "activations", "head", "passing", "base", "total")


def predicted(session: Session, largest: LargestMicroBatch) -> list[Peak]:
    """The peaks of this run; on the cpu with the memory of its processes without a model. Every rank must call it."""
    config, world = session.config, session.world
    config = replace(config, layout=session.model.layout)
    peaks = predict(
        session.model.spec, config, ranks=world.size, dtype=session.model.dtype, device=world.device, largest=largest
    )
    held = sum(parameter.nbytes for parameter in session.model.module.parameters())
    base = world.device.held_memory() - held + LOADED if world.device.name == "cpu" else 0
    bases = torch.stack(world.gather(torch.tensor([world.pipeline_rank, base])))
    return [replace(peak, base=int(bases[bases[:, 0] == peak.stage, 1].max())) for peak in peaks]


def lines(peaks: Sequence[Peak]) -> list[str]:
    """A small table, in MB (a million bytes)."""
    head = "memory of a rank at its peak, predicted, MB:"
    rows = ["  stage" + "".join(f"{name:>12}" for name in COLUMNS) + "  when"]
    rows += [
        f"{peak.stage:7d}" + "".join(f"{getattr(peak, name) / 1e6:12,.0f}" for name in COLUMNS) + f"  {peak.moment}"
        for peak in peaks
    ]
    return [head, *rows]
