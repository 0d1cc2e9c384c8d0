"""The table of operators: each schema stands here, and nowhere else.

`library` defines the operators from this table. The C++ extensions only implement them, and torch compares the types of
their functions with the schema. N positions, m candidate ids, H hidden, V vocabulary rows, U touched rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_replay.kernels import torch_twins as twins
from megatron_replay.kernels.precision import accumulator


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator: its arguments and results, and who can compute them."""

    schema: str
    fake: Callable[..., Any]
    """Shapes and dtypes of the results, without computing them."""
    twin: Callable[..., Any] | None = None
    """The operator in plain torch, for any device; None: its caller has other code where no kernel is live."""
    triton: bool = False
    """True where `triton_launch` has it, for CUDA."""


def _changes_in_place(*args: Tensor | None) -> None:
    return None


def _restricted_fwd(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    columns: Tensor,
    gold: Tensor,
    mix: bool,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = hidden.new_empty(columns.shape[0], dtype=accumulator(hidden.dtype))
    n, width = gold.shape[0], hidden.shape[1]
    mixture, target_mixture = (z.new_empty(n if made else 0, width) for made in (mix, mix and targets is not None))
    return z, z.new_empty(3, n), mixture, target_mixture


def _restricted_bwd_rows(
    hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor
) -> Tensor:
    return coefficient.new_empty(touched.shape[0], hidden.shape[1])


def _restricted_logits_fwd(
    logits: Tensor, offsets: Tensor, columns: Tensor, gold: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    z = logits.new_empty(columns.shape[0], dtype=accumulator(logits.dtype))
    return z, z.new_empty(3, gold.shape[0])


def _topk_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, kept = logits.shape[0], min(k, logits.shape[1])
    values = logits.new_empty(n, kept, dtype=accumulator(logits.dtype))
    return values, logits.new_empty(n, kept, dtype=torch.int64), logits.new_empty(n, dtype=torch.float64)


def _optimizer_sums(grads: Sequence[Tensor], momenta: Sequence[Tensor | None]) -> Tensor:
    return torch.empty(len(grads), 3, dtype=torch.float64)


def _adam_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rounded: Sequence[Tensor],
    scalars: Tensor,
) -> Tensor:
    return torch.empty(len(params), dtype=torch.float64)


OPERATORS = {
    "restricted_fwd": Operator(
        schema="(Tensor hidden, Tensor weight, Tensor offsets, Tensor columns, Tensor gold, bool mix,"
        " Tensor? targets=None) -> (Tensor, Tensor, Tensor, Tensor)",
        fake=_restricted_fwd,
        twin=twins.restricted_fwd,
        triton=True,
    ),
    "restricted_bwd_dh": Operator(
        schema="(Tensor(a!) mixture, Tensor weight, Tensor columns, Tensor gold, Tensor scale,"
        " Tensor? target_mixture=None) -> ()",
        fake=_changes_in_place,
        twin=twins.restricted_bwd_dh,
        triton=True,
    ),
    "restricted_bwd_dw": Operator(
        schema="(Tensor hidden, Tensor touched, Tensor begins, Tensor tokens, Tensor coefficient,"
        " Tensor(a!) grad_weight) -> ()",
        fake=_changes_in_place,
        twin=twins.restricted_bwd_dw,
        triton=True,
    ),
    "restricted_bwd_rows": Operator(
        schema="(Tensor hidden, Tensor touched, Tensor begins, Tensor tokens, Tensor coefficient) -> Tensor",
        fake=_restricted_bwd_rows,
        twin=twins.restricted_bwd_rows,
        triton=True,
    ),
    "restricted_logits_fwd": Operator(
        schema="(Tensor logits, Tensor offsets, Tensor columns, Tensor gold, Tensor? targets=None) -> (Tensor, Tensor)",
        fake=_restricted_logits_fwd,
        twin=twins.restricted_logits_fwd,
        triton=True,
    ),
    "restricted_logits_bwd": Operator(
        schema="(Tensor z, Tensor offsets, Tensor columns, Tensor gold, Tensor scalars, Tensor(a!) grad_logits,"
        " Tensor? targets=None) -> ()",
        fake=_changes_in_place,
        twin=twins.restricted_logits_bwd,
        triton=True,
    ),
    "topk_rows": Operator(
        schema="(Tensor logits, int k) -> (Tensor, Tensor, Tensor)",
        fake=_topk_rows,
        twin=twins.topk_rows,
    ),
    "optimizer_sums": Operator(
        schema="(Tensor[] grads, Tensor?[] momenta) -> Tensor",
        fake=_optimizer_sums,
    ),
    "adam_update": Operator(
        schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
        " Tensor(d!)[] rounded, Tensor scalars) -> Tensor",
        fake=_adam_update,
    ),
}
"""Name -> operator: those of the loss and the selection, then the optimizers' two."""
