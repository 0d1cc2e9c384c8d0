"""Ordinary cross-entropy over the whole vocabulary, a chunk of rows at a time: the `loss: full` baseline.

N positions, H hidden, V vocabulary rows here. Losses are float32, or float64 for float64 inputs.
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

CHUNK_ROWS = 256


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    gold: Tensor,
    shard: VocabShard | None = None,
    *,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """-log softmax(hidden @ weight.T)[gold], [N]; differentiable in `hidden` and `weight`.

    Logits exist for `chunk_rows` rows at a time (256 when None) and are computed again in the backward pass. As in the
    restricted loss the gradient of `hidden` is this rank's part: the sum over the group is the whole.

    Args:
        hidden: [N, H].
        weight: [V, H], the vocabulary rows shard.start..shard.stop.
        gold: [N] integer, global ids.
        vocab_size: ids from here on are padding rows and take no part in the softmax.

    Raises:
        DataError: a gold id outside the vocabulary, or not one for each row.
        LayoutError: the shard is not as wide as `weight`.
    """
    return linear_terms(hidden, weight, gold, shard, vocab_size=vocab_size, chunk_rows=chunk_rows)[0]


def linear_terms(
    hidden: Tensor,
    weight: Tensor,
    gold: Tensor,
    shard: VocabShard | None = None,
    *,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of `linear_cross_entropy` and the log-sum-exp over the vocabulary, each [N] and differentiable.

    Arguments and errors are those of `linear_cross_entropy`.
    """
    shard = shard_of(weight.shape[0], shard)
    _check_gold(hidden, gold, shard, vocab_size)
    padding = shard.padding(vocab_size, weight.device)
    loss, lse = _LinearCrossEntropy.apply(hidden, weight, gold, shard, padding, chunk_rows or CHUNK_ROWS)
    return loss, lse


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    gold: Tensor,
    shard: VocabShard | None = None,
    *,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """log p(gold) of each row under the whole vocabulary, [N], without gradient.

    Its exponential is the confidence of Stage 0.
    """
    with torch.no_grad():
        return -linear_cross_entropy(hidden, weight, gold, shard, vocab_size=vocab_size, chunk_rows=chunk_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, gold: Tensor, shard: VocabShard, padding: Tensor, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        slot = shard.columns(gold.long())
        stats = hidden.new_empty(3, hidden.shape[0], dtype=accumulator(hidden.dtype))
        for rows in _chunks(hidden.shape[0], chunk_rows):
            stats[:, rows] = _stats(_logits(hidden[rows], weight, padding), slot[rows])
        top, total, hit = stats
        peak = shard.max_(top.clone())
        total, hit = shard.sum_(torch.stack([total * (top - peak).exp(), hit]))
        ctx.save_for_backward(hidden, weight, slot, peak, total, padding)
        ctx.chunk_rows = chunk_rows
        ctx.set_materialize_grads(False)
        return total.log() + (peak - hit), peak + total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor | None, of_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, slot, peak, total, padding = ctx.saved_tensors
        grad = torch.zeros_like(total) if of_loss is None else of_loss
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for rows in _chunks(hidden.shape[0], ctx.chunk_rows):
            g = _logits(hidden[rows], weight, padding).sub_(peak[rows, None]).exp_().div_(total[rows, None])
            mine = (slot[rows] >= 0).nonzero()[:, 0]
            if of_lse is None:
                g[mine, slot[rows][mine]] -= 1
                g = g.mul_(grad[rows, None]).to(weight.dtype)
            else:
                g.mul_((grad + of_lse)[rows, None])
                g[mine, slot[rows][mine]] -= grad[rows][mine]
                g = g.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = g @ weight
            if grad_weight is not None:
                _add_product(grad_weight, g, hidden[rows])
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, padding: Tensor) -> Tensor:
    """[n, V], -inf in the columns of padding rows."""
    return (hidden @ weight.t()).to(accumulator(hidden.dtype)).index_fill_(1, padding, -torch.inf)


def _stats(logits: Tensor, slot: Tensor) -> Tensor:
    """(max, sum exp(z - max), gold logit) of this rank's columns, [3, n]; (-3e38, 0, 0) where it has none."""
    if not logits.shape[1]:
        return logits.new_tensor([EMPTY, 0.0, 0.0])[:, None].expand(3, logits.shape[0])
    hit = torch.where(slot >= 0, logits.gather(1, slot.clamp(min=0)[:, None])[:, 0], 0.0)
    top = logits.amax(1).clamp_(min=EMPTY)  # where all is padding it is -inf
    return torch.stack([top, logits.sub_(top[:, None]).exp_().sum(1), hit])


def _add_product(out: Tensor, g: Tensor, hidden: Tensor) -> None:
    """out += g.T @ hidden, summed in out's dtype over chunks."""
    if out.dtype == g.dtype:
        out.addmm_(g.t(), hidden)
    else:
        out.add_(g.t() @ hidden)


def _chunks(count: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def _check_gold(hidden: Tensor, gold: Tensor, shard: VocabShard, vocab_size: int | None) -> None:
    if gold.shape != hidden.shape[:1]:
        raise DataError(
            f"hidden states of shape {tuple(hidden.shape)} need one gold id a row, got gold of shape "
            f"{tuple(gold.shape)}"
        )
    # without a vocabulary size a rank of a group does not know where the vocabulary ends
    end = vocab_size if vocab_size is not None else shard.stop if shard.is_whole else None
    outside = (gold < 0) if end is None else (gold < 0) | (gold >= end)
    if bool(outside.any()):
        row = int(outside.nonzero()[0, 0])
        raise DataError(f"gold id {int(gold[row])} of row {row} lies outside the vocabulary of {end} ids")
