"""The restricted loss in Triton, as the programs of each grid; `triton_launch` starts them.

The forward pass has a program for each position: an online softmax over the candidates. It reads each weight row once,
for the logit and for the mixture that becomes the gradient of the hidden state. Flash attention does the same; here
keys and values are the set's rows of the weight.

The gradient of the weight has a program for each distinct id. The entries lie by id. The program sums its row in the
order of the positions and writes it once.

The loss from given logits has a program for each position. It reads the logits of the candidates, and in the backward
pass writes their gradient.

There are no atomics and no collectives, so the same input gives the same bits.

A run of more than SPLIT entries (a long set, a frequent id) is cut into parts of SPLIT from its own beginning. The
`further` kernels sum the parts after the first into scratch rows, and the program of the run adds those in order.
The starts of all parts are at least SPLIT apart, so at / SPLIT is a scratch row of their own. The grid is therefore
known without asking the device how long the runs are.

A program holds ROWS x WIDTH elements, whole rows of H <= WIDTH; sums are in ACC, float32 or float64. `width` is H,
`num` N and `entries` m. `hidden_row` and its like are strides in elements; without a stride of the columns, rows are
contiguous. `targets` [m] may be None: y is then 1 at the gold id and 0 elsewhere.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-3e38)  # maximum of no candidates, see torch_twins.EMPTY


@triton.jit
def num_below(table, num, value):
    """The number of values in the ascending table[:num] that are below `value`."""
    low = tl.full((), 0, tl.int64)
    high = low + num
    while low < high:
        middle = (low + high) // 2
        below = tl.load(table + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def gathered(matrix, stride, rows, across, wanted, width, ACC: tl.constexpr):
    """matrix[rows[i], across] where wanted[i], else 0: [ROWS, WIDTH]."""
    at = rows.to(tl.int64)[:, None] * stride + across[None, :]
    return tl.load(matrix + at, mask=wanted[:, None] & (across[None, :] < width), other=0).to(ACC)


@triton.jit
def taken_in(top, total, logits):
    """Take logits (-inf where there is none) into an online softmax with this maximum and sum.

    Returns the new maximum and sum, exp(logits - maximum), and the factor for everything taken in before.
    """
    peak = tl.maximum(top, tl.max(logits, 0))
    mass = tl.exp(logits - peak)
    shrink = tl.exp(top - peak)
    return peak, total * shrink + tl.sum(mass, 0), mass, shrink


@triton.jit
def softmax_piece(
    hidden, hidden_row, weight, weight_row, columns, targets, z, width, t, begin, end, gold,
    ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write the logits of the entries begin..end of position t into z.

    Returns their maximum, sum of exponentials, sum of y z, mixture [WIDTH], and target mixture [WIDTH], which is 0
    without targets.
    """
    across = tl.arange(0, WIDTH)
    h = tl.load(hidden + t * hidden_row + across, mask=across < width, other=0).to(ACC)
    top = tl.full((), EMPTY, ACC)
    total = tl.full((), 0, ACC)
    aimed = tl.full((), 0, ACC)
    mixture = tl.zeros((WIDTH,), ACC)
    target_mixture = tl.zeros((WIDTH,), ACC)
    for at in range(begin, end, ROWS):
        entries = at + tl.arange(0, ROWS)
        here = entries < end
        rows = gathered(weight, weight_row, tl.load(columns + entries, mask=here, other=0), across, here, width, ACC)
        logits = tl.sum(rows * h[None, :], 1)
        tl.store(z + entries, logits, mask=here)
        if targets is None:
            aimed += tl.sum(tl.where(entries == gold, logits, 0), 0)
        else:
            y = tl.load(targets + entries, mask=here, other=0)
            aimed += tl.sum(y * logits, 0)
            target_mixture += tl.sum(rows * y[:, None], 0)
        top, total, mass, shrink = taken_in(top, total, tl.where(here, logits, -float("inf")))
        mixture = mixture * shrink + tl.sum(rows * mass[:, None], 0)
    return top, total, aimed, mixture, target_mixture


@triton.jit
def restricted_fwd_further(
    hidden, hidden_row, weight, weight_row, offsets, columns, gold, targets, z,
    scratch_stats, scratch, target_scratch, width, num,
    MIX: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program p: the part, not the first of its set, that begins in p SPLIT .. (p + 1) SPLIT, if there is one."""
    slot = tl.program_id(0).to(tl.int64)
    t = num_below(offsets, num + 1, slot * SPLIT + 1) - 1  # the set that has this entry
    first, last = tl.load(offsets + t), tl.load(offsets + t + 1)
    begin = first + (slot * SPLIT - first + SPLIT - 1) // SPLIT * SPLIT
    if (begin > first) & (begin < last):
        end = tl.minimum(begin + SPLIT, last)
        top, total, aimed, mixture, target_mixture = softmax_piece(
            hidden, hidden_row, weight, weight_row, columns, targets, z, width, t, begin, end, tl.load(gold + t),
            ACC, ROWS, WIDTH,
        )  # fmt: skip
        slots = tl.num_programs(0)
        tl.store(scratch_stats + slot, top)
        tl.store(scratch_stats + slots + slot, total)
        tl.store(scratch_stats + 2 * slots + slot, aimed)
        if MIX:
            across = tl.arange(0, WIDTH)
            tl.store(scratch + slot * width + across, mixture, mask=across < width)
            if targets is not None:
                tl.store(target_scratch + slot * width + across, target_mixture, mask=across < width)


@triton.jit
def restricted_fwd(
    hidden, hidden_row, weight, weight_row, offsets, columns, gold, targets, z, stats, mixtures, target_mixtures,
    scratch_stats, scratch, target_scratch, width, num, slots,
    MIX: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program t: the first SPLIT candidates of position t, then its further parts in order."""
    t = tl.program_id(0).to(tl.int64)
    begin, last = tl.load(offsets + t), tl.load(offsets + t + 1)
    top, total, aimed, mixture, target_mixture = softmax_piece(
        hidden, hidden_row, weight, weight_row, columns, targets, z, width, t, begin,
        tl.minimum(begin + SPLIT, last), tl.load(gold + t), ACC, ROWS, WIDTH,
    )  # fmt: skip
    across = tl.arange(0, WIDTH)
    for at in range(begin + SPLIT, last, SPLIT):
        slot = at // SPLIT
        other = tl.load(scratch_stats + slot)
        peak = tl.maximum(top, other)
        shrink, grow = tl.exp(top - peak), tl.exp(other - peak)
        total = total * shrink + tl.load(scratch_stats + slots + slot) * grow
        aimed += tl.load(scratch_stats + 2 * slots + slot)
        if MIX:
            more = tl.load(scratch + slot * width + across, mask=across < width, other=0)
            mixture = mixture * shrink + more * grow
            if targets is not None:
                target_mixture += tl.load(target_scratch + slot * width + across, mask=across < width, other=0)
        top = peak
    tl.store(stats + t, top)
    tl.store(stats + num + t, total)
    tl.store(stats + 2 * num + t, aimed)
    if MIX:
        tl.store(mixtures + t * width + across, mixture, mask=across < width)
        if targets is not None:
            tl.store(target_mixtures + t * width + across, target_mixture, mask=across < width)


@triton.jit
def restricted_bwd_dh(
    mixture, weight, weight_row, columns, gold, scale, target_mixture, width, num,
    ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (t, b): WIDTH elements of mixture[t] <- scale[0, t] mixture[t] - scale[1, t] target_mixture[t].

    target_mixture may be None; it is then W[gold of t] where that is here.
    """
    t = tl.program_id(0).to(tl.int64)
    across = tl.program_id(1).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = across < width
    row = tl.load(mixture + t * width + across, mask=inside, other=0) * tl.load(scale + t)
    if target_mixture is not None:
        row -= tl.load(target_mixture + t * width + across, mask=inside, other=0) * tl.load(scale + num + t)
    else:
        target = tl.load(gold + t)
        if target >= 0:
            column = tl.load(columns + target).to(tl.int64)
            drop = tl.load(weight + column * weight_row + across, mask=inside, other=0).to(ACC)
            row -= drop * tl.load(scale + num + t)
    tl.store(mixture + t * width + across, row, mask=inside)


@triton.jit
def sum_piece(
    hidden,
    hidden_row,
    tokens,
    coefficient,
    width,
    begin,
    end,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """sum of coefficient times hidden over the entries begin..end: [WIDTH]."""
    across = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), ACC)
    for at in range(begin, end, ROWS):
        some = at + tl.arange(0, ROWS)
        here = some < end
        factor = tl.load(coefficient + some, mask=here, other=0)
        rows = gathered(hidden, hidden_row, tl.load(tokens + some, mask=here, other=0), across, here, width, ACC)
        total += tl.sum(rows * factor[:, None], 0)
    return total


@triton.jit
def restricted_bwd_further(
    hidden, hidden_row, begins, tokens, coefficient, scratch, width, num,
    ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program p: the part, not the first of its column, that begins in p SPLIT .. (p + 1) SPLIT, if there is one."""
    slot = tl.program_id(0).to(tl.int64)
    u = num_below(begins, num + 1, slot * SPLIT + 1) - 1  # the column that has this entry
    first, last = tl.load(begins + u).to(tl.int64), tl.load(begins + u + 1).to(tl.int64)
    begin = first + (slot * SPLIT - first + SPLIT - 1) // SPLIT * SPLIT
    if (begin > first) & (begin < last):
        end = tl.minimum(begin + SPLIT, last)
        total = sum_piece(hidden, hidden_row, tokens, coefficient, width, begin, end, ACC, ROWS, WIDTH)
        across = tl.arange(0, WIDTH)
        tl.store(scratch + slot * width + across, total, mask=across < width)


@triton.jit
def restricted_bwd(
    hidden, hidden_row, touched, begins, tokens, coefficient, out, out_row, scratch, width,
    ADD: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program u: the sum of column u, added to row touched[u] of `out`, or stored into row u."""
    u = tl.program_id(0).to(tl.int64)
    begin, last = tl.load(begins + u).to(tl.int64), tl.load(begins + u + 1).to(tl.int64)
    total = sum_piece(
        hidden, hidden_row, tokens, coefficient, width, begin, tl.minimum(begin + SPLIT, last), ACC, ROWS, WIDTH
    )
    across = tl.arange(0, WIDTH)
    inside = across < width
    for at in range(begin + SPLIT, last, SPLIT):
        total += tl.load(scratch + at // SPLIT * width + across, mask=inside, other=0)
    if ADD:
        to = out + tl.load(touched + u).to(tl.int64) * out_row + across
        tl.store(to, tl.load(to, mask=inside, other=0) + total, mask=inside)
    else:
        tl.store(out + u * out_row + across, total, mask=inside)


@triton.jit
def flaws_by_column(touched, begins, tokens, found, num, entries, positions, vocab, BLOCK: tl.constexpr):
    """Store in found[p] whether one of these BLOCK touched rows, column bounds or positions is invalid.

    Invalid is out of order, or outside what it points into.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < num
    row = tl.load(touched + at, mask=here, other=0)
    after = tl.load(touched + at + 1, mask=at + 1 < num, other=2147483647)
    wrong = here & ((row < 0) | (row >= vocab) | (after <= row))
    begin = tl.load(begins + at, mask=here, other=0)
    end = tl.load(begins + at + 1, mask=here, other=1)
    wrong |= here & (
        (begin < 0)
        | (end <= begin)
        | (end > entries)
        | ((at == 0) & (begin != 0))
        | ((at == num - 1) & (end != entries))
    )
    token = tl.load(tokens + at, mask=at < entries, other=0)
    wrong |= (at < entries) & ((token < 0) | (token >= positions))
    tl.store(found + tl.program_id(0), tl.max(wrong.to(tl.int32), 0))


@triton.jit
def restricted_logits_fwd(
    logits, logits_row, logits_column, offsets, columns, gold, targets, z, stats, num,
    ACC: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program t: the candidates of position t, SPLIT at a time."""
    t = tl.program_id(0).to(tl.int64)
    last, gold_at = tl.load(offsets + t + 1), tl.load(gold + t)
    top = tl.full((), EMPTY, ACC)
    total = tl.full((), 0, ACC)
    aimed = tl.full((), 0, ACC)
    for at in range(tl.load(offsets + t), last, SPLIT):
        entries = at + tl.arange(0, SPLIT)
        here = entries < last
        column = tl.load(columns + entries, mask=here, other=0).to(tl.int64)
        some = tl.load(logits + t * logits_row + column * logits_column, mask=here, other=0).to(ACC)
        tl.store(z + entries, some, mask=here)
        if targets is None:
            aimed += tl.sum(tl.where(entries == gold_at, some, 0), 0)
        else:
            aimed += tl.sum(tl.load(targets + entries, mask=here, other=0) * some, 0)
        top, total, _, _ = taken_in(top, total, tl.where(here, some, -float("inf")))
    tl.store(stats + t, top)
    tl.store(stats + num + t, total)
    tl.store(stats + 2 * num + t, aimed)


@triton.jit
def restricted_logits_bwd(
    z, offsets, columns, gold, targets, scalars, grad_logits, grad_row, grad_column, num, SPLIT: tl.constexpr
):
    """Program t: the gradient at the candidates of position t, SPLIT at a time."""
    t = tl.program_id(0).to(tl.int64)
    last, gold_at = tl.load(offsets + t + 1), tl.load(gold + t)
    peak, factor, grad = tl.load(scalars + t), tl.load(scalars + num + t), tl.load(scalars + 2 * num + t)
    for at in range(tl.load(offsets + t), last, SPLIT):
        entries = at + tl.arange(0, SPLIT)
        here = entries < last
        column = tl.load(columns + entries, mask=here, other=0).to(tl.int64)
        mass = tl.exp(tl.load(z + entries, mask=here, other=0) - peak) * factor
        if targets is None:
            value = tl.where(entries == gold_at, mass - grad, mass)
        else:
            value = mass - tl.load(targets + entries, mask=here, other=0) * grad
        tl.store(grad_logits + t * grad_row + column * grad_column, value, mask=here)


@triton.jit
def flaws(offsets, columns, gold, found, num, entries, vocab, BLOCK: tl.constexpr):
    """Store in found[p] whether one of these BLOCK columns, set bounds or gold entries is out of range.

    gold may be None.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(columns + at, mask=at < entries, other=0)
    wrong = (at < entries) & ((column < 0) | (column >= vocab))
    begin = tl.load(offsets + at, mask=at < num, other=0)
    end = tl.load(offsets + at + 1, mask=at < num, other=0)
    wrong |= (begin < 0) | (end < begin) | (end > entries)
    if gold is not None:
        target = tl.load(gold + at, mask=at < num, other=-1)
        wrong |= (target < -1) | (target >= entries)
    tl.store(found + tl.program_id(0), tl.max(wrong.to(tl.int32), 0))
