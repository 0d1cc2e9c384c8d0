"""RecAdam's pull towards the weights of the start (arXiv 2004.12651), usable with every optimizer here.

The objective goes over from staying near the base weights theta_0 to the task:

    lambda(t) L + (1 - lambda(t)) gamma/2 |theta - theta_0|^2, with lambda(t) = 1 / (1 + exp(-k (t - t0)))

As in the paper (eq. 8) the quadratic part is decoupled from the moments:

    theta <- theta - lr (1 - lambda) gamma (theta - theta_0)

The optimizer's own step is made lambda times as long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_replay.errors import ConfigError
from megatron_replay.optim.option_checks import check_number


@dataclass(frozen=True)
class Pull:
    """The pull's gamma (`strength`), k (1/steps) and t0 (steps); a strength of 0 leaves the optimizer's step alone."""

    strength: float = 0.0
    k: float = 0.5
    t0: float = 250.0

    def __post_init__(self) -> None:
        check_number("pull", self.strength, at_least=0)
        check_number("pull_k", self.k, at_least=0)
        check_number("pull_t0", self.t0)

    def task_weight(self, step: int) -> float:
        """lambda(t), the weight of the task in the objective, in [0, 1]; 1 without a pull."""
        if not self.strength:
            return 1.0
        x = self.k * (step - self.t0)
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    def towards(self, param: Tensor, base: Tensor, *, step: int, lr: float) -> None:
        """Move `param` towards `base` (both of one shape) in place; computed in the base's dtype.

        Raises ConfigError where the pull is so strong that it would overshoot the base weights.
        """
        rate = lr * (1 - self.task_weight(step)) * self.strength
        if rate > 1:
            raise ConfigError(
                f"pull={self.strength:g} at lr {lr:g} would move {rate:.3g} times the distance to the base weights; "
                "keep lr * pull below 1"
            )
        if rate:
            param.copy_(base.lerp(param.to(base.dtype), 1 - rate))
