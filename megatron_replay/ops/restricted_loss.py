"""Stage 1: cross-entropy renormalised over each position's candidate set (arXiv 2510.09152, section 2).

L_t = w_t (logsumexp_{j in S_t} z_tj - sum_{j in S_t} y_tj z_tj) with z_tj = h_t . W_j for j in S_t only. Its gradient
in z is w_t (p~ - y) on S_t and 0 elsewhere. Sets without targets y and weights w are the paper's loss: y is 1 at the
gold id, and w is 1.

N positions, m candidate ids here, H hidden, V vocabulary rows here. Losses are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_replay.errors import DataError
from megatron_replay.kernels.library import Kernels, choose
from megatron_replay.kernels.precision import accumulator
from megatron_replay.kernels.torch_twins import set_gradient
from megatron_replay.ops.local_sets import LocalSets
from megatron_replay.ops.sets import CandidateSets
from megatron_replay.ops.shard import VocabShard, shard_of


def restricted_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    sets: CandidateSets | LocalSets,
    shard: VocabShard | None = None,
    *,
    main_grad: Tensor | None = None,
    sparse: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """The restricted loss of each position, [N], without ever building [N, V] logits.

    It is the first of `restricted_linear_terms`, which describes arguments, gradients and errors.
    """
    terms = restricted_linear_terms(hidden, weight, sets, shard, main_grad=main_grad, sparse=sparse, kernels=kernels)
    return terms[0]


def restricted_linear_terms(
    hidden: Tensor,
    weight: Tensor,
    sets: CandidateSets | LocalSets,
    shard: VocabShard | None = None,
    *,
    main_grad: Tensor | None = None,
    sparse: bool = False,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The restricted loss of each position, and the log-sum-exp of the logits of its whole set: [N] each.

    The log-sum-exp is over the current logits of all shards, and no weights scale it. Its gradient in z is p~.

    Both are differentiable in `hidden` and `weight`. Sums are float32 for bfloat16 inputs. Over a sharded vocabulary
    two collectives run in the forward pass and none in the backward. The gradient of `hidden` is then this rank's part,
    and the sum over the group is the whole. Wrap `hidden` in the copy-to-tensor-parallel region of the framework, whose
    backward does that sum.

    Args:
        hidden: [N, H].
        weight: [V, H], the vocabulary rows shard.start..shard.stop.
        sets: N candidate sets, the same on every rank. Or this shard's part of them, `sets.local(shard).indexed()`,
            which a loader prepares while the device computes. Only the latter can have targets and weights.
        main_grad: [V, H]; when given, backward adds the weight's gradient to its rows in place and returns none for
            `weight`.
        sparse: return the weight's gradient as a sparse tensor of its touched rows, as torch.nn.Embedding(sparse=True)
            does.
        kernels: "auto" or "reference".

    Raises:
        DataError: N differs between `hidden` and `sets`, or an id is outside a vocabulary that is whole here.
        LayoutError: the shard is not as wide as `weight`.
    """
    shard = shard_of(weight.shape[0], shard)
    trained = torch.is_grad_enabled() and (weight.requires_grad or main_grad is not None)
    here = _local(sets, shard, hidden, by_column=trained)
    loss, lse = _RestrictedLinear.apply(hidden, weight, here, shard, main_grad, sparse, choose(kernels))
    return _weighted(loss, here), lse


def restricted_cross_entropy(
    logits: Tensor, sets: CandidateSets | LocalSets, shard: VocabShard | None = None, *, kernels: str = "auto"
) -> Tensor:
    """The same loss, [N], from logits [N, V] (columns shard.start..shard.stop).

    It is the exactness reference, and right for any head. Raises what `restricted_linear_cross_entropy` does; `kernels`
    as there.
    """
    shard = shard_of(logits.shape[1], shard)
    here = _local(sets, shard, logits)
    loss: Tensor = _RestrictedLogits.apply(logits, here, shard, choose(kernels))
    return _weighted(loss, here)


def _weighted(loss: Tensor, here: LocalSets) -> Tensor:
    return loss if here.weights is None else loss * here.weights.to(loss.dtype)


class _RestrictedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        here: LocalSets,
        shard: VocabShard,
        main_grad: Tensor | None,
        sparse: bool,
        ops: Kernels,
    ) -> tuple[Tensor, Tensor]:
        z, stats, *mixtures = ops.restricted_fwd(
            hidden, weight, here.offsets, here.columns, here.gold, ctx.needs_input_grad[0], here.targets
        )
        loss, lse, peak, total = _combine(stats, shard)
        ctx.save_for_backward(hidden, weight, z, stats[0], peak, total)
        ctx.here, ctx.ops, ctx.main_grad, ctx.sparse, ctx.mixtures = here, ops, main_grad, sparse, mixtures
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, z, top, peak, total = ctx.saved_tensors
        of_softmax = grad + grad_lse  # the factor of p~; that of y is grad alone
        here, ops = ctx.here, ctx.ops
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            mixtures, ctx.mixtures = ctx.mixtures, None  # the first becomes the gradient in place
            if mixtures is None:  # backward came before, through a retained graph
                table = (here.offsets, here.columns, here.gold)
                mixtures = ops.restricted_fwd(hidden, weight, *table, True, here.targets)[2:]
            mixture, target_mixture = mixtures
            scale = torch.stack([(top - peak).exp_().mul_(of_softmax).div_(total), grad])
            subtracted = None if here.targets is None else target_mixture
            ops.restricted_bwd_dh(mixture, weight, here.columns, here.gold, scale, subtracted)
            grad_hidden = mixture.to(hidden.dtype)
        if ctx.main_grad is not None or ctx.needs_input_grad[1]:
            scalars = torch.stack([peak, of_softmax / total, grad])
            coefficient = set_gradient(z, here.offsets, here.gold, scalars, here.targets)
            entries = (hidden, *here.by_column.entries(coefficient))
            if ctx.main_grad is not None:
                ops.restricted_bwd_dw(*entries, ctx.main_grad)
            elif ctx.sparse:
                rows = ops.restricted_bwd_rows(*entries).to(weight.dtype)
                grad_weight = torch.sparse_coo_tensor(
                    here.by_column.touched.long()[None], rows, weight.shape, is_coalesced=True, check_invariants=False
                )
            else:
                grad_weight = _zeros(weight.shape, weight.dtype, weight.device)
                ops.restricted_bwd_dw(*entries, grad_weight)
        return grad_hidden, grad_weight, None, None, None, None, None


class _RestrictedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, here: LocalSets, shard: VocabShard, ops: Kernels) -> Tensor:
        z, stats = ops.restricted_logits_fwd(logits, here.offsets, here.columns, here.gold, here.targets)
        loss, _, peak, total = _combine(stats, shard)
        ctx.save_for_backward(z, peak, total)
        ctx.here, ctx.ops, ctx.shape, ctx.dtype = here, ops, logits.shape, logits.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, peak, total = ctx.saved_tensors
        here = ctx.here
        grad_logits = _zeros(ctx.shape, ctx.dtype, grad.device)
        scalars = torch.stack([peak, grad / total, grad])
        ctx.ops.restricted_logits_bwd(z, here.offsets, here.columns, here.gold, scalars, grad_logits, here.targets)
        return grad_logits, None, None, None


def _combine(stats: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Local (max, sum exp, sum y z) [3, N] -> loss, log-sum-exp, max and sum exp of the whole set, each [N].

    Two collectives: MAX, then one SUM.
    """
    top, total, aimed = stats
    peak = shard.max_(top.clone())
    total, aimed = shard.sum_(torch.stack([total * (top - peak).exp(), aimed]))
    log_total = total.log()
    return log_total + (peak - aimed), log_total + peak, peak, total


def _zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for a gradient of which little will be written.

    On the CPU it is memory that the system has cleared but not yet handed out.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = shape.numel() * dtype.itemsize
    flat = torch.from_numpy(np.zeros(size + 64, np.uint8))
    start = -flat.data_ptr() % 64
    return flat[start : start + size].view(dtype).view(shape)


def _local(sets: CandidateSets | LocalSets, shard: VocabShard, rows: Tensor, *, by_column: bool = False) -> LocalSets:
    """The sets of `rows` as this shard sees them.

    They are cut where they are and moved then, so that no accelerator has to be waited for. Targets get the dtype in
    which the rows are summed.
    """
    if sets.num_positions != rows.shape[0]:
        raise DataError(
            f"{sets.num_positions} candidate sets for {rows.shape[0]} rows; pass the rows of the stored positions only"
        )
    here = sets if isinstance(sets, LocalSets) else sets.local(shard)
    here = (here.indexed() if by_column else here).to(rows.device)
    return (
        here if here.targets is None else replace(here, targets=here.targets.to(accumulator(rows.dtype)).contiguous())
    )
