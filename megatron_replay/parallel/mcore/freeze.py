"""Half fine-tuning of a sharded model: `optim.half` over the whole model's tensors, so that every layout freezes the
same ones."""

from __future__ import annotations

import torch

from megatron_replay.errors import LayoutError
from megatron_replay.optim import half
from megatron_replay.parallel.mcore.model import Model


def freeze_half(model: Model, share: float, seed: int) -> None:
    """Freeze a `share` of the model's tensors; to be called before it is wrapped for training. Collective.

    Frozen tensors have neither gradient buffer nor optimizer state. The tensors are megatron's: query, key and value
    are one, and so are gate and up. Raises LayoutError where a pipeline stage would have nothing left to train.
    """
    model.freeze(
        half(((weight.name, torch.empty(weight.shape, device="meta")) for weight in model.table()), share, seed)
    )
    model.frozen_by = (share, seed)
    trained = [any(parameter.requires_grad for parameter in model.module.parameters())]
    idle = [rank for rank, (any_,) in enumerate(model.world.gather_objects(trained)) if not any_]
    if idle:
        raise LayoutError(
            f"train.freeze_share={share} leaves rank {idle[0]} nothing to train; lower it, or give every pipeline "
            "stage more layers"
        )
