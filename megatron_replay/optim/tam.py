"""Torque-aware momentum (TAM): the more a gradient points along the momentum, the more it counts.

There are two forms. `adatamw` (arXiv 2412.18790, AdaTAMW) smooths the cosine S of momentum and gradient, s <- gamma s +
(1 - gamma) S. The gradient enters the momentum damped by it, m <- beta1 m + (eps + (1 + s) / 2) g. That momentum has no
factor 1 - beta1, so its steps are up to 1 / (1 - beta1) times AdamW's. Lower the learning rate by as much for a
comparison.

`paper` is what arXiv 2510.09152 compares with: AdamW's step times max(0, cos phi).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.errors import CheckpointError
from megatron_replay.optim.adam import MomentCoefficients
from megatron_replay.optim.adamw import AdamW, AdamWOptions
from megatron_replay.optim.base import OPTIMIZERS
from megatron_replay.optim.option_checks import check_beta, check_choice
from megatron_replay.optim.shards import Placement
from megatron_replay.optim.stats import Scope, cosines, grouped

Variant = Literal["adatamw", "paper"]


def smoothed(similarity: Tensor, cosine: Tensor, decay: float) -> Tensor:
    """s <- gamma s + (1 - gamma) S, [groups]; where there is no momentum or gradient yet the cosine counts as 0."""
    return decay * similarity + (1 - decay) * cosine.nan_to_num(0.0)


@OPTIMIZERS.register("tam")
class TAM(AdamW):
    """Torque-aware momentum in both forms.

    Momentum and gradient are compared over each tensor, a layer, or the whole model (`scope`). `decay` is gamma. The
    smoothed similarities of the whole model (one number a group of the scope) are kept in the parameter groups, beside
    `step`.
    """

    reads_momentum = True
    prefix = "tam"

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        variant: Variant = "adatamw",
        scope: Scope = "tensor",
        decay: float = 0.9,
        **others: Unpack[AdamWOptions],
    ) -> None:
        check_choice("variant", variant, get_args(Variant))
        check_choice("scope", scope, get_args(Scope))
        check_beta("decay", decay)
        super().__init__(params, lr, **others)
        self.variant, self.scope, self.decay = variant, scope, decay
        self._row: list[float] = []

    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        super().plan(sums, place, scale)
        groups, label = grouped(sums[:, :3], place.layers, scope=self.scope)
        cosine = cosines(*groups.unbind(1))
        if self.variant == "paper":
            # before there is a momentum nothing says that the gradient is wrong
            factor = cosine.clamp(min=0).nan_to_num(1.0)
        else:
            similarity = smoothed(self._similarity(len(groups)), cosine, self.decay)
            for group in self.param_groups:
                group["similarity"] = similarity.tolist()
            factor = (1 + similarity) / 2
        self._row = factor[label].tolist()
        known = cosine[~cosine.isnan()]
        if len(known):
            self.metrics |= {"tam/cosine_mean": float(known.mean()), "tam/factor_mean": float(factor.mean())}

    def _similarity(self, groups: int) -> Tensor:
        saved = self.param_groups[0].get("similarity") or [0.0] * groups
        if len(saved) != groups:
            raise CheckpointError(
                f"the state holds {len(saved)} similarities, scope={self.scope!r} has {groups}; resume with the same "
                "scope"
            )
        return torch.tensor(saved, dtype=torch.float64)

    def moment_coefficients(self, row: int, betas: tuple[float, float]) -> MomentCoefficients:
        plain = super().moment_coefficients(row, betas)
        if self.variant == "paper":
            return plain
        return MomentCoefficients(betas[0], (self.defaults["eps"] + self._row[row]) * self._scale, plain.v_grad)

    def gain(self, row: int) -> float:
        return self._row[row] if self.variant == "paper" else 1.0
