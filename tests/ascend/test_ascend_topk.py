"""topk on the stand-in: merged, its candidates are the reference's k largest, ties included; and its sums are the row's
log-sum-exp."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, topk
from stand_in import Library, StandInError
from torch import Tensor

from megatron_replay.kernels import torch_twins as plain

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def made(kind: str, n: int, width: int) -> Tensor:
    gen = torch.Generator().manual_seed(width)
    x = torch.randn(n, width, generator=gen)
    if kind == "ties":
        return x.round()
    if kind == "all equal":
        return torch.full((n, width), 1.5)
    if kind == "rising":
        return torch.arange(float(width)).expand(n, width) / 7
    if kind == "falling":
        return -torch.arange(float(width)).expand(n, width) / 7
    if kind == "mostly -inf":
        return x.where(torch.rand(n, width, generator=gen) < 0.02, torch.tensor(-torch.inf))
    if kind == "zeros of both signs":
        return (x * 0).where(x < 1, x)
    if kind == "large":
        return x * 1e4
    return x


def right(kernels: Library, logits: Tensor, k: int, width: int | None = None, **how: object) -> None:
    values, columns, sums = topk(kernels, logits, k, width, **how)
    wanted = plain.topk_rows(logits[:, :width], k)
    real = wanted[0] > -torch.inf
    assert torch.equal(values, wanted[0])
    assert torch.equal(columns.long()[real], wanted[1][real]) and (columns[~real] < 0).all()
    lse = torch.where(sums[:, 1] > 0, sums[:, 0].double() + sums[:, 1].double().log(), -torch.inf)
    torch.testing.assert_close(lse, wanted[2], rtol=1e-6, atol=2e-6)


@dtypes
@pytest.mark.parametrize(
    "kind", ["normal", "ties", "all equal", "rising", "falling", "mostly -inf", "zeros of both signs", "large"]
)
@pytest.mark.parametrize(("width", "k"), [(40, 5), (2048, 200), (9000, 200), (9000, 1)])
def test_it_is_the_reference(kernels: Library, kind: str, width: int, k: int, dtype: torch.dtype) -> None:
    right(kernels, made(kind, 3, width).to(dtype), k)


@pytest.mark.parametrize(("width", "k"), [(1, 1), (5, 200), (2047, 7), (2049, 513), (37_984, 200), (6000, 2048)])
def test_widths_and_sizes(kernels: Library, width: int, k: int) -> None:
    right(kernels, made("normal", 2, width).to(torch.bfloat16), k)


def test_a_row_of_nothing(kernels: Library) -> None:
    logits = torch.full((2, 300), -torch.inf)
    logits[1, 7] = 3
    right(kernels, logits, 5)


def test_many_empty_slots(kernels: Library) -> None:
    logits = torch.full((1, 60 * 2048), -torch.inf)
    logits[0, ::2048] = torch.arange(60.0)
    right(kernels, logits, 250)


def test_padding_columns_do_not_count(kernels: Library) -> None:
    logits = made("normal", 4, 700)
    logits[:, 600:] = 99
    right(kernels, logits.to(torch.bfloat16), 40, width=600)


def test_no_rows(kernels: Library) -> None:
    right(kernels, torch.empty(0, 50), 5)


def test_k_it_does_not_take(kernels: Library) -> None:
    for k in (0, 2049):
        with pytest.raises(StandInError, match=f"selects 1 to 2048 of a row, not {k}"):
            topk(kernels, torch.zeros(1, 5000), k)


@dtypes
def test_blocks_and_their_order_change_no_bit(kernels: Library, dtype: torch.dtype) -> None:
    logits = made("ties", 7, 5000).to(dtype)
    first = topk(kernels, logits, 200, blocks=1)
    for blocks in (2, 3, 8):
        for backwards in (False, True):
            assert all(
                torch.equal(*pair)
                for pair in zip(topk(kernels, logits, 200, blocks=blocks, backwards=backwards), first, strict=True)
            )


@dtypes
def test_traffic_and_instructions_stay_in_the_budget(kernels: Library, dtype: torch.dtype) -> None:
    n, width, k = 4, 37_984, 200
    logits = made("normal", n, width).to(dtype)
    topk(kernels, logits, k, blocks=4)
    used, chunks = kernels.counters(), -(-width // 2048)
    assert used["mte2_bytes"] == n * width * dtype.itemsize and used["mte2"] == n * chunks
    assert used["mte3_bytes"] <= n * (512 * 8 + 40) and used["mte3"] <= 4 * n
    assert used["repeats"] <= n * width / 64 * 11 and used["v"] <= n * chunks * 50
    assert used["scalar_waits"] == 0
