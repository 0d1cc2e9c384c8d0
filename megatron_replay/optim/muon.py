"""Muon (Keller Jordan; arXiv 2502.16982 for the scale): momentum whose matrix is orthogonalised; AdamW for all that is
no hidden matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.optim.adam import decayed_step
from megatron_replay.optim.adamw import AdamW, AdamWOptions
from megatron_replay.optim.base import OPTIMIZERS, Group, Move, state_dtype
from megatron_replay.optim.newton_schulz import PRECISIONS, Precision, orthogonalised
from megatron_replay.optim.options import check_beta, check_choice, check_number
from megatron_replay.optim.shards import Kind, Placement
from megatron_replay.optim.stats import sum_of_squares


class MuonOptions(AdamWOptions, total=False):
    """The keyword arguments of `Muon`, for those derived from it."""

    momentum: float
    nesterov: bool
    ns_steps: int
    ns_precision: Precision


HIDDEN: frozenset[Kind] = frozenset({"matrix", "attention"})
"""What Muon is for: hidden matrices."""


def muon_direction(blend: Tensor, orthogonal: Callable[[Tensor], Tensor]) -> Tensor:
    """0.2 sqrt(max(rows, cols)) NS(blend) for a momentum [rows, cols]: as long as AdamW's steps usually are
    ("match_rms_adamw")."""
    return orthogonal(blend).mul_(0.2 * math.sqrt(max(blend.shape)))


@OPTIMIZERS.register("muon")
class Muon(AdamW):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw" and nesterov on hidden matrices, AdamW (`betas`, `eps`) on
    everything else.

    In a model of your own give embeddings and the head a parameter group with `kind="embedding"` (`optim.muon_groups`
    does it by name): their shape does not tell. Where megatron fuses matrices (query, key and value; gate and up) each
    is orthogonalised by itself, as it is in a Hugging Face model. Matrices keep one state tensor, `exp_avg`.
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

    def apply(self, moves: Sequence[Move], place: Placement) -> None:
        hidden = [move for move in moves if place.kinds[move.row] in HIDDEN]
        super().apply([move for move in moves if place.kinds[move.row] not in HIDDEN], place)
        params = [move.param for move in hidden]
        for i, result in self.shards.each_whole(
            params, lambda i: self.before(hidden[i]), self.whole, len(self.matrix_keys)
        ):
            self.travelled(params[i], self.after(hidden[i], result))

    def before(self, move: Move) -> Tensor:
        """Advance the momentum; what Newton-Schulz is to see of this piece, [1, *shape]."""
        momentum = self.state_of(move.param, self.matrix_keys)["exp_avg"]
        g = move.grad.to(momentum.dtype) * self.gradient_scale(move.row)
        momentum.lerp_(g, 1 - self.momentum)
        return (g.lerp_(momentum, self.momentum) if self.nesterov else momentum.clone())[None]

    def whole(self, values: Tensor) -> Tensor:
        """The direction of a whole matrix, [1, rows, cols] of `before` -> [1, rows, cols]."""
        return muon_direction(values[0], self.orthogonal)[None]

    def after(self, move: Move, result: Tensor) -> Tensor:
        """Take the step; returns the sum of squares of the direction."""
        return self.stride(move.param, result[0], move.group)

    def orthogonal(self, matrix: Tensor) -> Tensor:
        """Newton-Schulz as this optimizer is set."""
        return orthogonalised(matrix, steps=self.ns_steps, precision=self.ns_precision)

    def stride(self, param: Tensor, direction: Tensor, group: Group) -> Tensor:
        """One decayed step along a direction of the parameter's shape, which is overwritten; returns its sum of
        squares."""
        squares = sum_of_squares(direction)
        weight = self.weight(param)
        theta = weight.to(state_dtype(param))
        decayed_step(theta, direction, lr=self.rate(group), weight_decay=group["weight_decay"])
        if theta is not weight:
            weight.copy_(theta)
        self.settle(param)
        return squares


def muon_groups(model: torch.nn.Module) -> list[Group]:
    """Parameter groups of any model for the Muon family: everything in an nn.Embedding or named lm_head is no hidden
    matrix."""
    tables = {p for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    tables |= {p for name, p in model.named_parameters() if "lm_head" in name.split(".")}
    hidden = [p for p in model.parameters() if p not in tables]
    return [{"params": hidden}, {"params": [p for p in model.parameters() if p in tables], "kind": "embedding"}]
