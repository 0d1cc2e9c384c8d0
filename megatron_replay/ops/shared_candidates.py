"""Candidates that all positions share: their log-sum-exp, from one small dense product.

N positions, H hidden, V vocabulary rows here, n shared candidates here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_replay.errors import DataError
from megatron_replay.kernels.precision import accumulator
from megatron_replay.kernels.torch_twins import EMPTY
from megatron_replay.ops.shard import VocabShard, shard_of


def shared_log_sum_exp(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor,
    shard: VocabShard | None = None,
    *,
    main_grad: Tensor | None = None,
) -> Tensor:
    """log sum_k exp(h_t . W[k] + bias_tk) over the shared candidates k of all shards, [N].

    It is differentiable in `hidden` and `weight`; as in the restricted loss the gradient of `hidden` is this rank's
    part. A position whose candidates all have a bias of -inf gets -3e38, and no gradient.

    Args:
        hidden: [N, H].
        weight: [V, H].
        columns: [n] rows of `weight`, each once.
        bias: [N, n]: the logarithms of importance weights; -inf takes a candidate away from a position.
        main_grad: [V, H]; when given, backward adds the weight's gradient there and returns none for `weight`.

    Raises:
        DataError: the bias has another shape.
        LayoutError: the shard is not as wide as `weight`.
    """
    shard = shard_of(weight.shape[0], shard)
    if bias.shape != (hidden.shape[0], columns.shape[0]):
        raise DataError(
            f"shared candidates: the bias has shape {tuple(bias.shape)}, but there are {hidden.shape[0]} positions and "
            f"{columns.shape[0]} candidates"
        )
    out: Tensor = _SharedLogSumExp.apply(hidden, weight, columns.long(), bias, shard, main_grad)
    return out


class _SharedLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        columns: Tensor,
        bias: Tensor,
        shard: VocabShard,
        main_grad: Tensor | None,
    ) -> Tensor:
        z = (hidden @ weight[columns].t()).to(accumulator(hidden.dtype)) + bias
        top = torch.cat([z, z.new_full((z.shape[0], 1), EMPTY)], 1).amax(1)
        peak = shard.max_(top.clone())
        total = shard.sum_((z - peak[:, None]).exp_().sum(1))
        lse = torch.where(total > 0, peak + total.log(), EMPTY)
        ctx.save_for_backward(hidden, weight, columns, z, lse)
        ctx.main_grad = main_grad
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, z, lse = ctx.saved_tensors
        share = ((z - lse[:, None]).exp_() * grad[:, None]).to(weight.dtype)
        grad_hidden = share @ weight[columns] if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.main_grad is not None:
            ctx.main_grad.index_add_(0, columns, (share.t() @ hidden).to(ctx.main_grad.dtype))
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight).index_add_(0, columns, share.t() @ hidden)
        return grad_hidden, grad_weight, None, None, None, None
