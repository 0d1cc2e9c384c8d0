"""A model between its base and what it was trained to: base + alpha (mean of the trained - base), in place."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.parallel.mcore.model import Model


class WayBack:
    """Begin it with the base model's weights in the model, and `add` each trained state that is in it later.

    It keeps the base and the sum of the trained weights of this rank, in fp32 or wider.
    """

    def __init__(self, model: Model) -> None:
        self.parameters = [parameter for _, _, parameter in model.parameters()]
        self.base = [_wide(parameter) for parameter in self.parameters]
        self.total = [torch.zeros_like(tensor) for tensor in self.base]
        self.count = 0

    def add(self) -> None:
        """Take the weights that the model has now among the trained ones."""
        self.count += 1
        for total, parameter in zip(self.total, self.parameters, strict=True):
            total += _wide(parameter)

    def move(self, alpha: float) -> None:
        """Set the model's weights to base + alpha (mean - base): 1 is the mean of the trained, 0 the base."""
        with torch.no_grad():
            for parameter, base, total in zip(self.parameters, self.base, self.total, strict=True):
                parameter.copy_(base + alpha * (total / self.count - base))


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
