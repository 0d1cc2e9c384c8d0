"""Muon (Keller Jordan; arXiv 2502.16982 for the scale): the momentum of a hidden matrix is orthogonalised.

Everything else gets AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.optim.adam import decayed_step
from megatron_replay.optim.adamw import AdamW, AdamWOptions
from megatron_replay.optim.base import OPTIMIZERS, Group, ParamUpdate, state_dtype
from megatron_replay.optim.newton_schulz import PRECISIONS, Precision, orthogonalised
from megatron_replay.optim.option_checks import check_beta, check_choice, check_number
from megatron_replay.optim.shards import Kind, Placement
from megatron_replay.optim.stats import sum_of_squares


class MuonOptions(AdamWOptions, total=False):
    """The keyword arguments of `Muon`, for those derived from it."""

    momentum: float
    nesterov: bool
    ns_steps: int
    ns_precision: Precision


HIDDEN: frozenset[Kind] = frozenset({"matrix", "attention"})
"""The kinds of tensors that Muon orthogonalises: hidden matrices."""


def muon_direction(blend: Tensor, orthogonal: Callable[[Tensor], Tensor]) -> Tensor:
    """0.2 sqrt(max(rows, cols)) NS(blend) for a momentum [rows, cols].

    That is as long as AdamW's steps usually are ("match_rms_adamw").
    """
    return orthogonal(blend).mul_(0.2 * math.sqrt(max(blend.shape)))


@OPTIMIZERS.register("muon")
class Muon(AdamW):
    """torch.optim.Muon on hidden matrices, with adjust_lr_fn="match_rms_adamw" and nesterov; AdamW on everything else.

    `betas` and `eps` are AdamW's. In a model of your own give embeddings and the head a parameter group with
    `kind="embedding"`, because their shape does not show it; `optim.muon_groups` does it by name. Where megatron fuses
    matrices (query, key and value; gate and up) each is orthogonalised by itself, as in a Hugging Face model. Matrices
    keep one state tensor, `exp_avg`.
    """

    prefix = "muon"
    matrix_keys: tuple[str, ...] = ("exp_avg",)
    """Names of the state tensors of a hidden matrix; as many values of each element go into `whole`."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        ns_precision: Precision = "auto",
        **others: Unpack[AdamWOptions],
    ) -> None:
        check_beta("momentum", momentum)
        check_number("ns_steps", ns_steps, at_least=1)
        check_choice("ns_precision", ns_precision, PRECISIONS)
        super().__init__(params, lr, **others)
        self.momentum, self.nesterov = momentum, nesterov
        self.ns_steps, self.ns_precision = int(ns_steps), ns_precision

    @classmethod
    def keys_of(cls, kind: Kind) -> tuple[str, ...]:
        return cls.matrix_keys if kind in HIDDEN else cls.state_keys

    def apply(self, updates: Sequence[ParamUpdate], place: Placement) -> None:
        hidden = [update for update in updates if place.kinds[update.row] in HIDDEN]
        super().apply([update for update in updates if place.kinds[update.row] not in HIDDEN], place)
        params = [update.param for update in hidden]
        for i, result in self.shards.each_whole(
            params, lambda i: self.before(hidden[i]), self.whole, len(self.matrix_keys)
        ):
            self.record_squares(params[i], self.after(hidden[i], result))

    def before(self, update: ParamUpdate) -> Tensor:
        """Advance the momentum; returns this shard's part of what Newton-Schulz orthogonalises, [1, *shape]."""
        momentum = self.state_of(update.param, self.matrix_keys)["exp_avg"]
        g = update.grad.to(momentum.dtype) * self.gradient_scale(update.row)
        momentum.lerp_(g, 1 - self.momentum)
        return (g.lerp_(momentum, self.momentum) if self.nesterov else momentum.clone())[None]

    def whole(self, values: Tensor) -> Tensor:
        """The direction of a whole matrix: [1, rows, cols] of `before` -> [1, rows, cols]."""
        return muon_direction(values[0], self.orthogonal)[None]

    def after(self, update: ParamUpdate, result: Tensor) -> Tensor:
        """Take the step; returns the sum of squares of the direction."""
        return self.take_step(update.param, result[0], update.group)

    def orthogonal(self, matrix: Tensor) -> Tensor:
        """Newton-Schulz with this optimizer's steps and precision."""
        return orthogonalised(matrix, steps=self.ns_steps, precision=self.ns_precision)

    def take_step(self, param: Tensor, direction: Tensor, group: Group) -> Tensor:
        """Take one decayed step along a direction of the parameter's shape, which is overwritten.

        Returns its sum of squares.
        """
        squares = sum_of_squares(direction)
        weight = self.weight(param)
        theta = weight.to(state_dtype(param))
        decayed_step(theta, direction, lr=self.rate(group), weight_decay=group["weight_decay"])
        if theta is not weight:
            weight.copy_(theta)
        self.round_main_weights(param)
        return squares


def muon_groups(model: torch.nn.Module) -> list[Group]:
    """Parameter groups of any model for the Muon family.

    Every parameter in an nn.Embedding or named lm_head is of kind "embedding", so it counts as no hidden matrix.
    """
    tables = {p for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    tables |= {p for name, p in model.named_parameters() if "lm_head" in name.split(".")}
    hidden = [p for p in model.parameters() if p not in tables]
    return [{"params": hidden}, {"params": [p for p in model.parameters() if p in tables], "kind": "embedding"}]
