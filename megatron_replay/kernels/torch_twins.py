"""The operators in plain torch: right on every device, and the results that a compiled kernel must equal.

N positions, H hidden, V vocabulary rows here, m candidate ids here. Ragged tables are `offsets [N+1] int64`, `columns
[m] int32`. The restricted loss is a sampled dense-dense product forward (one dot product for each candidate) and two
sparse products for the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from megatron_replay.kernels.precision import accumulator, has_float64

EMPTY = -3e38
"""Maximum of no candidates: finite, so that a rank without one adds exp(EMPTY - max) = 0 instead of a NaN."""

GATHER_BYTES = 64 << 20
"""Gathered weight rows never take more memory than this."""

BLOCKS = (32, 4)
"""Widths of the blocks that `topk_rows` looks at before single columns; measured."""

_ROWS = 32
_LSE_ROWS = 2  # float64 copies of two rows of 50k to 150k columns stay in a core's cache


def restricted_fwd(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    columns: Tensor,
    gold: Tensor,
    mix: bool,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the candidates here, statistics of each position, and mixtures of the candidates' weight rows.

    - hidden [N, H], weight [V, H], gold [N] int64: index into columns or -1.
    - targets y [m] in z's dtype; None: 1 at the gold id, 0 elsewhere. With targets, nothing depends on `gold`.
    - logits z [m]. stats [3, N]: (max, sum exp(z - max), sum y z) per position.
    - A position without candidates here has (-3e38, 0, 0).
    - mixture [N, H] in z's dtype: sum over the candidates j of t of exp(z_tj - max_t) W[j]. It is [0, H] without `mix`.
    - target mixture [N, H] in z's dtype: sum of y_tj W[j]. It is [0, H] without `mix` or targets.

    `restricted_bwd_dh` makes the mixtures the gradient of `hidden`. They are computed here, where a kernel has each row
    of the weight at hand once. They stay apart, because the softmax of the whole set is known later only.
    """
    z = sampled_product(hidden, weight, offsets, columns)
    stats = set_stats(z, offsets, gold, targets)
    mixture, target_mixture = z.new_empty(0, hidden.shape[1]), z.new_empty(0, hidden.shape[1])
    if mix:
        mass = (z - stats[0][row_of(offsets, z.shape[0])]).exp_()
        mixture = weighted_rows(weight, offsets, columns, mass)
    if mix and targets is not None:
        target_mixture = weighted_rows(weight, offsets, columns, targets)
    return z, stats, mixture, target_mixture


def restricted_bwd_dh(
    mixture: Tensor,
    weight: Tensor,
    columns: Tensor,
    gold: Tensor,
    scale: Tensor,
    target_mixture: Tensor | None = None,
) -> None:
    """mixture[t] <- scale[0, t] mixture[t] - scale[1, t] target_mixture[t], each [N, H].

    Without a target mixture it is W[gold of t] where the gold id is here, and 0 elsewhere. scale is [2, N].
    """
    mixture.mul_(scale[0][:, None])
    if target_mixture is not None:
        mixture.addcmul_(target_mixture, scale[1][:, None], value=-1)
        return
    rows = (gold >= 0).nonzero()[:, 0]
    for part in _parts(rows.shape[0], 2 * weight.shape[1] * mixture.element_size()):
        some = rows[part]
        mixture.index_add_(0, some, weight[columns[gold[some]]].to(mixture.dtype).mul_(-scale[1][some, None]))


def restricted_bwd_dw(
    hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor, grad_weight: Tensor
) -> None:
    """Add the weight's gradient to its touched rows.

    grad_weight[touched[u]] += sum over the entries i of begins[u]..begins[u + 1] of coefficient[i] hidden[tokens[i]].

    The entries lie by column (`sets.ByColumn`), so each touched row is added to once. Its sum is in the order of the
    positions, whatever the number of threads. touched [U] and begins [U+1] int32, tokens [m] int32, coefficient [m].
    """
    for part, rows in _summed(hidden, begins, tokens, coefficient):
        grad_weight.index_add_(0, touched[part], rows.to(grad_weight.dtype))


def restricted_bwd_rows(hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor) -> Tensor:
    """The rows that `restricted_bwd_dw` adds to the touched ones: [U, H] in the coefficient's dtype."""
    return torch.cat(
        [coefficient.new_empty(0, hidden.shape[1]), *(rows for _, rows in _summed(hidden, begins, tokens, coefficient))]
    )


def restricted_logits_fwd(
    logits: Tensor, offsets: Tensor, columns: Tensor, gold: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z [m] and stats [3, N] as `restricted_fwd` has them, from logits [N, V] that are there already."""
    z = logits[row_of(offsets, columns.shape[0]), columns.long()].to(accumulator(logits.dtype))
    return z, set_stats(z, offsets, gold, targets)


def restricted_logits_bwd(
    z: Tensor,
    offsets: Tensor,
    columns: Tensor,
    gold: Tensor,
    scalars: Tensor,
    grad_logits: Tensor,
    targets: Tensor | None = None,
) -> None:
    """grad_logits[t, j] <- `set_gradient` at the candidates j of t; the rest of grad_logits [N, V] is left as it is."""
    values = set_gradient(z, offsets, gold, scalars, targets)
    grad_logits[row_of(offsets, z.shape[0]), columns.long()] = values.to(grad_logits.dtype)


def _summed(hidden: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The sums of the touched rows, some rows at a time."""
    source = hidden.to(coefficient.dtype)
    for part in _parts(begins.shape[0] - 1, 2 * hidden.shape[1] * coefficient.element_size()):
        first, last = int(begins[part.start]), int(begins[part.stop])
        starts = begins[part] - first
        yield (
            part,
            embedding_bag(tokens[first:last], source, starts, mode="sum", per_sample_weights=coefficient[first:last]),
        )


def weighted_rows(weight: Tensor, offsets: Tensor, columns: Tensor, factor: Tensor) -> Tensor:
    """sum over the candidates j of t of factor_tj W[j], [N, H] in the factor's dtype."""
    if _has_bag(weight):
        return embedding_bag(
            columns, weight, offsets.to(columns.dtype), mode="sum", per_sample_weights=factor, include_last_offset=True
        )
    rows = row_of(offsets, columns.shape[0])
    out = factor.new_zeros(offsets.shape[0] - 1, weight.shape[1])
    for part in _parts(columns.shape[0], 2 * weight.shape[1] * factor.element_size()):
        out.index_add_(0, rows[part], weight[columns[part]].to(out.dtype) * factor[part, None])
    return out


def sampled_product(hidden: Tensor, weight: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """z = hidden[t] . weight[j] for every candidate j of every position t: [m], in float32 (float64 for float64)."""
    rows = row_of(offsets, columns.shape[0])
    if _has_bag(weight) and columns.shape[0]:
        # the gradient of embedding_bag in its sample weights is exactly this product, and gathers nothing
        kind = columns.dtype
        product: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            hidden, weight, columns, offsets[:-1].to(kind), rows.to(kind), 0
        )
        return product
    out = hidden.new_empty(columns.shape[0], dtype=accumulator(hidden.dtype))
    for part in _parts(columns.shape[0], 3 * weight.shape[1] * out.element_size()):
        out[part] = (weight[columns[part]].to(out.dtype) * hidden[rows[part]].to(out.dtype)).sum(1)
    return out


def set_stats(z: Tensor, offsets: Tensor, gold: Tensor, targets: Tensor | None = None) -> Tensor:
    """(max, sum exp(z - max), sum y z) of each position: [3, N]; the last is the gold logit without targets."""
    if not z.shape[0]:
        return torch.stack([z.new_full(gold.shape, EMPTY), z.new_zeros(gold.shape), z.new_zeros(gold.shape)])
    rows = row_of(offsets, z.shape[0])
    if has_float64(z.device):
        top = torch.segment_reduce(z, "max", offsets=offsets, initial=EMPTY)
        total = torch.segment_reduce((z - top[rows]).exp_(), "sum", offsets=offsets, initial=0.0)
    else:  # an NPU has no segment_reduce either
        top = z.new_full(gold.shape, EMPTY).scatter_reduce(0, rows, z, "amax")
        total = z.new_zeros(gold.shape).index_add_(0, rows, (z - top[rows]).exp_())
    if targets is not None:
        return torch.stack([top, total, torch.zeros_like(total).index_add_(0, rows, z * targets)])
    return torch.stack([top, total, torch.where(gold >= 0, z[gold.clamp(min=0)], 0.0)])


def set_gradient(z: Tensor, offsets: Tensor, gold: Tensor, scalars: Tensor, targets: Tensor | None = None) -> Tensor:
    """factor_t exp(z_tj - peak_t) - y_tj grad_t for every candidate j of every position t: [m].

    scalars [3, N] = (peak, factor, grad). peak is the maximum of the whole set, and grad the gradient of the position's
    loss. With factor = grad / (the whole sum of exponentials) this is (p~ - y) grad. y [m] are the targets; without
    them it is 1 at the gold id and 0 elsewhere.
    """
    rows = row_of(offsets, z.shape[0])
    peak, factor, grad = scalars.unbind()
    out = (z - peak[rows]).exp_().mul_(factor[rows])
    if targets is not None:
        return out.addcmul_(targets, grad[rows], value=-1)
    # indexing by a mask would wait for an accelerator; a gold id that is elsewhere takes nothing from entry 0
    if z.shape[0]:
        out.scatter_add_(0, gold.clamp(min=0), torch.where(gold >= 0, -grad, 0.0))
    return out


def topk_rows(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of each row by (value descending, column ascending), and the log-sum-exp of the row in float64.

    logits [N, C] -> values [N, k'] float32 (float64 for float64), columns [N, k'] int64, lse [N] float64, with k' =
    min(k, C). A row with NaN or +inf has a NaN lse; a row of -inf only has -inf.
    """
    n, width = logits.shape
    kind, k = accumulator(logits.dtype), min(k, width)
    if not n or not width:
        return (
            logits.new_empty(n, k, dtype=kind),
            logits.new_empty(n, k, dtype=torch.int64),
            logits.new_full((n,), -torch.inf, dtype=torch.float64),
        )
    picked = []
    for start in range(0, n, _ROWS):
        rows = logits[start : start + _ROWS].to(kind)
        blocks = pad(rows, (0, -width % BLOCKS[0]), value=-torch.inf) if width % BLOCKS[0] else rows.contiguous()
        columns = _first(blocks, k, BLOCKS)
        picked.append((rows.gather(1, columns), columns, _lse(rows)))
    values, columns, lse = (torch.cat(parts) for parts in zip(*picked, strict=True))
    return values, columns, lse


def _first(rows: Tensor, k: int, widths: tuple[int, ...]) -> Tensor:
    """Columns of the k largest, [n, k], by (value descending, column ascending).

    The k largest columns lie in the k largest blocks, blocks ordered by (their maximum descending, block ascending).
    Were one in another block, each of the k blocks would hold a column before it. So blocks are chosen first, then
    narrower blocks within them, then columns.
    """
    if not widths:
        return _ordered(rows, k)
    n, width = rows.shape[0], widths[0]
    blocks = rows.shape[1] // width
    if blocks <= k:
        return _first(rows, k, widths[1:])
    chosen = _ordered(rows.view(n, blocks, width).amax(2), k).sort(1).values
    flat = chosen + torch.arange(0, n * blocks, blocks, device=rows.device)[:, None]
    inside = _first(rows.view(n * blocks, width).index_select(0, flat.view(-1)).view(n, k * width), k, widths[1:])
    return chosen.gather(1, inside // width) * width + inside % width


def _ordered(rows: Tensor, k: int) -> Tensor:
    """As `_first`, without blocks.

    torch.topk promises no order of equal values, so it is given keys that are never equal.
    """
    if rows.dtype == torch.float64:
        return rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = (rows + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # float order as integer order
    keys = ascending.long().bitwise_left_shift_(32).sub_(torch.arange(rows.shape[1], device=rows.device))
    return keys.topk(k).indices


def _lse(rows: Tensor) -> Tensor:
    if not has_float64(rows.device):
        top = rows.amax(1).clamp_(min=torch.finfo(rows.dtype).min)
        total = (rows - top[:, None]).exp_().sum(1)
        return (total.cpu().double().log_() + top.cpu().double()).to(rows.device)
    parts = []
    for some in rows.split(_LSE_ROWS):
        top = some.amax(1, keepdim=True).clamp_(min=torch.finfo(some.dtype).min).double()
        parts.append(some.to(torch.float64, copy=True).sub_(top).exp_().sum(1).log_() + top[:, 0])
    return torch.cat(parts)


def row_of(offsets: Tensor, count: int) -> Tensor:
    """[m] int64: the position of each entry of a ragged table."""
    return torch.repeat_interleave(offsets.diff(), output_size=count)


def _has_bag(weight: Tensor) -> bool:
    # torch has no sampled product of bfloat16 rows, and embedding_bag would sum them in bfloat16
    return weight.dtype in (torch.float32, torch.float64) and has_float64(weight.device)


def _parts(count: int, row_bytes: int) -> list[slice]:
    step = max(1, GATHER_BYTES // max(row_bytes, 1))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]
