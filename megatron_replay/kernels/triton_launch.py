"""The operators of `torch_twins` for CUDA tensors: each checks its arguments and launches Triton programs.

The programs are in `triton_programs`. They are checked against plain torch under Triton's interpreter and compiled for
sm_80 and sm_90; they never ran on a GPU. No operator waits for the device. Shapes or dtypes that do not fit together
raise RuntimeError. An id, offset or gold entry out of bounds is a device-side assertion, as in torch's own indexing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

from megatron_replay.kernels import triton_programs as programs
from megatron_replay.kernels.precision import accumulator

SPLIT = 256
"""Entries of a set, or of an id, that one program sums. It is above the usual k_max, so that few runs are cut."""

TILE = 8192
"""Elements that a program holds at a time (64 a thread), unless one row is longer."""

BLOCK = 1024
"""Elements that a program without whole rows takes."""

_KNOWN = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SUM = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


def restricted_fwd(
    hidden: Tensor,
    weight: Tensor,
    offsets: Tensor,
    columns: Tensor,
    gold: Tensor,
    mix: bool,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch_twins.restricted_fwd`."""
    op = "restricted_fwd"
    _check_matrix(op, "hidden", hidden)
    _need(
        weight.dim() == 2
        and weight.dtype == hidden.dtype
        and weight.shape[1] == hidden.shape[1]
        and weight.device == hidden.device,
        f"{op}: hidden is {_described(hidden)}, weight {_described(weight)}",
    )
    _check_table(op, hidden, offsets, columns, weight.shape[0], gold)
    (n, width), m, kind = hidden.shape, columns.shape[0], accumulator(hidden.dtype)
    _check_targets(op, targets, columns, kind)
    slots, mix_targets = _slots(m), mix and targets is not None
    z, stats, mixture, target_mixture, scratch_stats, scratch, target_scratch = (
        hidden.new_empty(shape, dtype=kind)
        for shape in (
            *((m,), (3, n), (n if mix else 0, width), (n if mix_targets else 0, width)),
            *((3, slots), (slots if mix else 0, width), (slots if mix_targets else 0, width)),
        )
    )
    h, w = _with_rows(hidden), _with_rows(weight)
    table, parts = (h, h.stride(0), w, w.stride(0), offsets, columns, gold, targets, z), (scratch_stats, scratch)
    tile = {"MIX": mix, "ACC": _SUM[kind], "SPLIT": SPLIT, **_tile(width, kind)}
    with _on(hidden):
        if slots:
            programs.restricted_fwd_further[(slots,)](*table, *parts, target_scratch, width, n, **tile)
        programs.restricted_fwd[(n,)](
            *table, stats, mixture, target_mixture, *parts, target_scratch, width, n, slots, **tile
        )
    return z, stats, mixture, target_mixture


def restricted_bwd_dh(
    mixture: Tensor,
    weight: Tensor,
    columns: Tensor,
    gold: Tensor,
    scale: Tensor,
    target_mixture: Tensor | None = None,
) -> None:
    """`torch_twins.restricted_bwd_dh`."""
    op, n, width = "restricted_bwd_dh", mixture.shape[0], weight.shape[-1]
    _check_matrix(op, "weight", weight)
    kind = accumulator(weight.dtype)
    wanted = [("mixture", mixture, (n, width)), ("scale", scale, (2, n))]
    if target_mixture is not None:
        wanted.append(("target_mixture", target_mixture, (n, width)))
    for name, tensor, shape in wanted:
        _need(
            tensor.shape == shape
            and tensor.dtype == kind
            and tensor.is_contiguous()
            and tensor.device == weight.device,
            f"{op}: {name} must be contiguous {list(shape)} {kind} on {weight.device}",
        )
    offsets = gold.new_zeros(n + 1)  # of no consequence here
    _check_table(op, mixture, offsets, columns, weight.shape[0], gold)
    w = _with_rows(weight)
    with _on(mixture):
        programs.restricted_bwd_dh[(n, triton.cdiv(width, BLOCK))](
            mixture, w, w.stride(0), columns, gold, scale, target_mixture, width, n, ACC=_SUM[kind], WIDTH=BLOCK
        )


def restricted_bwd_dw(
    hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor, grad_weight: Tensor
) -> None:
    """`torch_twins.restricted_bwd_dw`; a float16 or bfloat16 gradient's row is widened, added to, and rounded once."""
    op = "restricted_bwd_dw"
    _check_gradient(op, hidden, touched, begins, tokens, coefficient, grad_weight.shape[0])
    _need(
        grad_weight.dim() == 2 and grad_weight.shape[1] == hidden.shape[1] and grad_weight.device == hidden.device,
        f"{op}: grad_weight is {_described(grad_weight)}, hidden {_described(hidden)}",
    )
    if grad_weight.dtype in _KNOWN and _with_rows(grad_weight) is grad_weight:
        _sum_by_column(hidden, touched, begins, tokens, coefficient, grad_weight, add=True)
    else:
        rows = restricted_bwd_rows(hidden, touched, begins, tokens, coefficient)
        grad_weight.index_add_(0, touched, rows.to(grad_weight.dtype))


def restricted_bwd_rows(hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor) -> Tensor:
    """`torch_twins.restricted_bwd_rows`."""
    _check_gradient("restricted_bwd_rows", hidden, touched, begins, tokens, coefficient, torch.iinfo(torch.int32).max)
    rows = coefficient.new_empty(touched.shape[0], hidden.shape[1])
    _sum_by_column(hidden, touched, begins, tokens, coefficient, rows, add=False)
    return rows


def restricted_logits_fwd(
    logits: Tensor, offsets: Tensor, columns: Tensor, gold: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`torch_twins.restricted_logits_fwd`."""
    op = "restricted_logits_fwd"
    _check_matrix(op, "logits", logits)
    _check_table(op, logits, offsets, columns, logits.shape[1], gold)
    n, kind = logits.shape[0], accumulator(logits.dtype)
    _check_targets(op, targets, columns, kind)
    z, stats = (logits.new_empty(shape, dtype=kind) for shape in (columns.shape, (3, n)))
    with _on(logits):
        programs.restricted_logits_fwd[(n,)](
            logits, *logits.stride(), offsets, columns, gold, targets, z, stats, n, ACC=_SUM[kind], SPLIT=SPLIT
        )
    return z, stats


def restricted_logits_bwd(
    z: Tensor,
    offsets: Tensor,
    columns: Tensor,
    gold: Tensor,
    scalars: Tensor,
    grad_logits: Tensor,
    targets: Tensor | None = None,
) -> None:
    """`torch_twins.restricted_logits_bwd`."""
    op = "restricted_logits_bwd"
    _check_matrix(op, "grad_logits", grad_logits)
    _check_table(op, grad_logits, offsets, columns, grad_logits.shape[1], gold)
    n, kind = grad_logits.shape[0], accumulator(grad_logits.dtype)
    _check_targets(op, targets, columns, kind)
    for name, tensor, shape in (("z", z, columns.shape), ("scalars", scalars, (3, n))):
        _need(
            tensor.shape == shape
            and tensor.dtype == kind
            and tensor.is_contiguous()
            and tensor.device == grad_logits.device,
            f"{op}: {name} must be contiguous {list(shape)} {kind} on {grad_logits.device}",
        )
    with _on(grad_logits):
        programs.restricted_logits_bwd[(n,)](
            z, offsets, columns, gold, targets, scalars, grad_logits, *grad_logits.stride(), n, SPLIT=SPLIT
        )


def _sum_by_column(
    hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor, out: Tensor, *, add: bool
) -> None:
    """The sum of each column, added to its row of `out`, or stored into its row of `out` [U, H]."""
    (num,), width = touched.shape, hidden.shape[1]
    h, slots, kind = _with_rows(hidden), _slots(tokens.shape[0]), coefficient.dtype
    scratch, factors = coefficient.new_empty(slots, width), coefficient.contiguous()
    tile = {"ACC": _SUM[kind], "SPLIT": SPLIT, **_tile(width, kind)}
    with _on(hidden):
        if slots:
            programs.restricted_bwd_further[(slots,)](
                h, h.stride(0), begins, tokens, factors, scratch, width, num, **tile
            )
        programs.restricted_bwd[(num,)](
            h, h.stride(0), touched, begins, tokens, factors, out, out.stride(0), scratch, width, ADD=add, **tile
        )


def _slots(entries: int) -> int:
    """Scratch rows for the parts of runs that are cut; none where no run can be."""
    return triton.cdiv(entries, SPLIT) if entries > SPLIT else 0


def _tile(width: int, kind: torch.dtype) -> dict[str, int]:
    """Rows held at a time, and warps such that a thread holds 64 float32 (or 32 float64) of them.

    At H = 4,096 nothing of float32 or bfloat16 spills (ptxas, sm_90).
    """
    across = triton.next_power_of_2(max(width, 1))
    rows = min(max(TILE // across, 1), SPLIT)
    return {"ROWS": rows, "WIDTH": across, "num_warps": min(max(rows * across * kind.itemsize // 8192, 1), 16)}


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """A context that makes the tensor's device the current one, on which Triton launches."""
    kind = tensor.device.type
    chosen: AbstractContextManager[None] = (
        nullcontext() if kind == "cpu" else getattr(torch, kind).device(tensor.device)
    )
    return chosen


def _with_rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous: itself where it is one."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _need(fits: bool, message: str) -> None:
    if not fits:
        raise RuntimeError(message)  # as the compiled kernels do


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def _check_matrix(op: str, name: str, x: Tensor) -> None:
    _need(x.dim() == 2, f"{op}: {name} must be a matrix, got shape {tuple(x.shape)}")
    _need(
        x.dtype in _KNOWN,
        f"{op}: {name} is {x.dtype}; written for float16, bfloat16, float32, float64 (kernels=reference takes others)",
    )


def _check_gradient(
    op: str, hidden: Tensor, touched: Tensor, begins: Tensor, tokens: Tensor, coefficient: Tensor, vocab: int
) -> None:
    """Check the entries by column, for rows of `hidden` and a weight of `vocab` rows.

    They are touched [U], begins [U + 1] and tokens [m], int32, and a coefficient [m] of each entry.
    """
    _check_matrix(op, "hidden", hidden)
    num, m, kind = touched.shape[0], tokens.shape[0], accumulator(hidden.dtype)
    for name, tensor, size in (("touched", touched, num), ("begins", begins, num + 1), ("tokens", tokens, m)):
        _need(
            tensor.shape == (size,)
            and tensor.dtype == torch.int32
            and tensor.is_contiguous()
            and tensor.device == hidden.device,
            f"{op}: {name} must be contiguous [{size}] torch.int32 on {hidden.device}",
        )
    _need(
        coefficient.shape == tokens.shape and coefficient.dtype == kind and coefficient.device == hidden.device,
        f"{op}: coefficient must be [{m}] {kind} on {hidden.device}",
    )
    blocks = triton.cdiv(max(num, m), BLOCK)
    found = tokens.new_empty(blocks)
    with _on(hidden):
        programs.flaws_by_column[(blocks,)](touched, begins, tokens, found, num, m, hidden.shape[0], vocab, BLOCK=BLOCK)
    what = (
        f"{op}: a touched row, bound or position is out of order or points outside the {vocab} rows or "
        f"{hidden.shape[0]} positions"
    )
    torch.ops.aten._assert_async.msg(~found.any(), what)


def _check_targets(op: str, targets: Tensor | None, columns: Tensor, kind: torch.dtype) -> None:
    _need(
        targets is None
        or (
            targets.shape == columns.shape
            and targets.dtype == kind
            and targets.is_contiguous()
            and targets.device == columns.device
        ),
        f"{op}: targets must be contiguous {list(columns.shape)} {kind} on {columns.device}",
    )


def _check_table(
    op: str, rows: Tensor, offsets: Tensor, columns: Tensor, vocab: int, gold: Tensor | None = None
) -> None:
    """Check offsets [N + 1] int64, columns [m] int32 and gold [N] int64 of the N `rows`, over `vocab` columns."""
    n, m = rows.shape[0], columns.shape[0]
    wanted = [("offsets", offsets, torch.int64, n + 1), ("columns", columns, torch.int32, m)]
    for name, tensor, kind, size in [*wanted, ("gold", gold, torch.int64, n)] if gold is not None else wanted:
        _need(
            tensor.shape == (size,)
            and tensor.dtype == kind
            and tensor.is_contiguous()
            and tensor.device == rows.device,
            f"{op}: {name} must be contiguous [{size}] {kind} on {rows.device}",
        )
    blocks = triton.cdiv(max(n, m), BLOCK)
    found = columns.new_empty(blocks)
    with _on(rows):
        programs.flaws[(blocks,)](offsets, columns, gold, found, n, m, vocab, BLOCK=BLOCK)
    torch.ops.aten._assert_async.msg(
        ~found.any(), f"{op}: a column, offset or gold entry points outside the {vocab} rows or {m} entries"
    )
