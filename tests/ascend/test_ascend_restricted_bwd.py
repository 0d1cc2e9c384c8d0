"""restricted_bwd_dh and restricted_bwd_dw on the stand-in against plain torch: values, the same bits for every split,
traffic."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Sets, close, restricted_bwd_dh, restricted_bwd_dw, restricted_fwd_reference, sets
from stand_in import Library
from torch import Tensor

from megatron_replay.kernels import torch_twins as plain

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CASES = {
    "sizes": ([1, 2, 0, 15, 16, 0, 200, 31, 3], 300, 64),
    "one column": ([1] * 200, 1, 16),
    "hot columns": ([3] * 130, 3, 48),
    "parts of 64": ([2] * 64, 2, 32),
    "576": ([9, 40, 17], 60, 576),
    "5,120": ([9, 3], 30, 5120),
    "8,192": ([5, 3], 40, 8192),
    "no positions": ([], 50, 48),
    "one position": ([11], 50, 48),
    "no rows here": ([0, 0], 0, 32),
}


def dh_case(case: str, dtype: torch.dtype) -> tuple[Sets, Tensor, Tensor]:
    x = sets(*CASES[case], dtype)
    scale = torch.rand(2, len(x.gold), generator=torch.Generator().manual_seed(1))
    return x, restricted_fwd_reference(x)[2], scale


@dtypes
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("case", CASES)
def test_dh_is_the_reference(kernels: Library, case: str, soft: bool, dtype: torch.dtype) -> None:
    x, mixture, scale = dh_case(case, dtype)
    targets = mixture.flip(0).contiguous() if soft else None
    (found,) = restricted_bwd_dh(kernels, x, mixture, scale, targets)
    plain.restricted_bwd_dh(mixture, x.weight, x.columns, x.gold, scale, targets)
    assert close(found, mixture)


@dtypes
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_dw_is_the_reference(kernels: Library, case: str, kept: torch.dtype | None, dtype: torch.dtype) -> None:
    x = sets(*CASES[case], dtype)
    coefficient = torch.linspace(-1, 1, len(x.columns))
    vocab, width = x.weight.shape
    exact = torch.zeros(vocab, width, dtype=torch.float64)
    rows = plain.row_of(x.offsets, len(x.columns))
    exact.index_add_(0, x.columns.long(), x.hidden[rows].double() * coefficient[:, None].double())
    if kept is None:
        (found,) = restricted_bwd_dw(kernels, x, coefficient, None)
        assert close(found, exact[x.columns.long().unique()].float(), 4e-6)
        return
    before = torch.arange(vocab * width).view(vocab, width).sin().to(kept)
    (found,) = restricted_bwd_dw(kernels, x, coefficient, before)
    assert close(found, (before.double() + exact).to(kept), 4e-6 if kept == torch.float32 else 2**-8)
    untouched = torch.ones(vocab, dtype=torch.bool).index_fill(0, x.columns.long(), False)
    assert torch.equal(found[untouched], before[untouched])


@dtypes
def test_blocks_and_their_order_change_no_bit(kernels: Library, dtype: torch.dtype) -> None:
    x, mixture, scale = dh_case("sizes", dtype)
    hot = sets(*CASES["hot columns"], dtype)
    coefficient, grad = torch.linspace(-1, 1, len(hot.columns)), torch.ones(hot.weight.shape)
    first = None
    for blocks in (1, 2, 3, 8, 40):
        for backwards in (False, True):
            how = {"blocks": blocks, "backwards": backwards}
            found = (
                *restricted_bwd_dh(kernels, x, mixture, scale, **how),
                *restricted_bwd_dh(kernels, x, mixture, scale, 2 * mixture, **how),
                *restricted_bwd_dw(kernels, hot, coefficient, grad, **how),
            )
            first = first or found
            assert all(torch.equal(*pair) for pair in zip(found, first, strict=True))


@dtypes
@pytest.mark.parametrize("width", [16, 1024, 2560, 4096, 5120, 8192])
@pytest.mark.parametrize("kept", DTYPES, ids=str)
def test_the_tiling_is_what_the_kernel_allocates(
    kernels: Library, width: int, kept: torch.dtype, dtype: torch.dtype
) -> None:
    x = sets([1], 2, width, dtype)
    restricted_bwd_dw(kernels, x, torch.ones(1), torch.zeros(2, width, dtype=kept))
    rows, outs, size = kernels.tiling("dw", dtype, kept, width, True)
    assert 1 <= rows <= 16 and 1 <= outs <= 2
    assert kernels.counters()["buffer"] == size <= 196_608
    assert kernels.counters(kernel=1)["buffer"] <= 196_608  # the merge


def test_dh_reads_and_writes_each_row_once(kernels: Library) -> None:
    x = sets([3] * 40, 90, 2560, torch.bfloat16)
    mixture, scale = torch.zeros(40, 2560), torch.ones(2, 40)
    restricted_bwd_dh(kernels, x, mixture, scale, blocks=4)
    used, gold = kernels.counters(), int((x.gold >= 0).sum())
    rows = 40 * 2560 * 4 + gold * 2560 * 2
    assert rows <= used["mte2_bytes"] <= rows + 40 * 16 and used["mte3_bytes"] == 40 * 2560 * 4
    assert used["v"] <= 3 * 40 and used["repeats"] <= 40 * 40 + gold * 80
    assert used["mte2"] <= 40 + gold + 3 * 4 and used["mte3"] == 40
    assert used["scalar_waits"] <= 2 * 3 * 4
    restricted_bwd_dh(kernels, x, mixture, scale, mixture + 1, blocks=4)
    used, rows = kernels.counters(), 2 * 40 * 2560 * 4
    assert rows <= used["mte2_bytes"] <= rows + 40 * 16 and used["mte3_bytes"] == 40 * 2560 * 4
    assert used["v"] <= 2 * 40 and used["repeats"] <= 2 * 40 * 40 and used["mte2"] <= 2 * 40 + 3 * 4


def test_dw_reads_each_entry_once_and_touched_rows_once(kernels: Library) -> None:
    x, width, blocks = sets([58] * 24, 600, 2560, torch.bfloat16), 2560, 4
    m, touched = len(x.columns), len(x.columns.unique())
    restricted_bwd_dw(kernels, x, torch.ones(m), torch.zeros(600, width), blocks=blocks)
    used = kernels.counters()
    rows = m * width * 2 + touched * width * 4
    tables = 4 * (2 * m + 2 * touched) + blocks * (600 * 4)
    assert rows <= used["mte2_bytes"] <= rows + tables and used["mte3_bytes"] == touched * width * 4
    tiling_rows = kernels.tiling("dw", torch.bfloat16, torch.float32, width, True)[0]
    tiles = touched + m // tiling_rows
    assert used["repeats"] <= m * (40 + 40) + touched * 40 and used["v"] <= m + tiles + touched
    assert used["mte2"] <= m + touched + blocks * 4 + (2 * m + 2 * touched) / 256 and used["mte3"] == touched
    # tokens and factors of a part are read in stretches of 256
    assert used["scalar_waits"] <= 2 * ((2 * m + 2 * touched) / 256 + 4 * blocks)


def test_a_hot_column_does_not_fall_to_one_block(kernels: Library) -> None:
    x = sets([1] * 2048, 1, 32, torch.bfloat16)
    assert len(x.columns.unique()) == 1
    restricted_bwd_dw(kernels, x, torch.ones(2048), torch.zeros(1, 32), blocks=4)
    work = [kernels.counters(block)["mte2_bytes"] for block in range(4)]
    assert max(work) <= 1.2 * sum(work) / 4
