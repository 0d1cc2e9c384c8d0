"""restricted_fwd on the stand-in against plain torch: values at its edges, the same bits for every split, traffic, and
what breaks it."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Sets, close, restricted_fwd, restricted_fwd_reference, sets
from stand_in import Library, StandInError

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
softs = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
CASES = {
    "sizes": ([1, 2, 0, 15, 16, 0, 200, 31, 3], 300, 64),
    "odd multiple of 16": ([5, 40, 0, 7], 60, 16),
    "576": ([9, 40, 17], 60, 576),
    "1,040": ([30, 2, 5], 64, 1040),
    "2,560": ([20, 1, 0, 33], 90, 2560),
    "8,192": ([5, 3], 40, 8192),
    "no positions": ([], 50, 48),
    "one position": ([11], 50, 48),
    "one empty position": ([0], 50, 48),
    "no rows here": ([0, 0], 0, 32),
    "two windows": ([3] * 300, 40, 16),
}


def problem(case: str, dtype: torch.dtype, soft: bool) -> Sets:
    """With targets, float32 rows of 8,192 do not fit the buffer."""
    sizes, vocab, width = CASES[case]
    return sets(sizes, vocab, 7680 if soft and width == 8192 and dtype == torch.float32 else width, dtype, soft=soft)


@dtypes
@softs
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(kernels: Library, case: str, soft: bool, dtype: torch.dtype) -> None:
    x = problem(case, dtype, soft)
    found = restricted_fwd(kernels, x)
    assert all(close(*pair) for pair in zip(found, restricted_fwd_reference(x), strict=True))
    alone = restricted_fwd(kernels, x, mix=False)
    assert torch.equal(alone[0], found[0]) and torch.equal(alone[1], found[1])


@dtypes
@softs
def test_blocks_and_their_order_change_no_bit(kernels: Library, soft: bool, dtype: torch.dtype) -> None:
    x = problem("sizes", dtype, soft)
    first = restricted_fwd(kernels, x, blocks=1)
    for blocks in (1, 2, 3, 8, 40):
        for backwards in (False, True):
            again = restricted_fwd(kernels, x, blocks=blocks, backwards=backwards)
            assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))


def test_a_set_of_65535(kernels: Library) -> None:
    x = sets([65_535, 2], 66_000, 16, torch.bfloat16)
    assert all(
        close(*pair, tolerance=2e-5)
        for pair in zip(restricted_fwd(kernels, x), restricted_fwd_reference(x), strict=True)
    )


@dtypes
def test_tied_logits(kernels: Library, dtype: torch.dtype) -> None:
    x = sets([1, 7, 100], 200, 80, dtype, tied=True)
    z, stats, mixture = restricted_fwd(kernels, x)
    assert stats[1].tolist() == [1, 7, 100] and z[8:].unique().numel() == 1
    assert close(mixture, stats[1][:, None] * x.weight[0].float(), 1e-6)


def test_large_and_small_logits(kernels: Library) -> None:
    x = sets([3, 40], 64, 16, torch.float32)
    x.weight[x.columns[2]] *= 1e4
    x.weight[x.columns[10]] *= -1e4
    assert all(close(*pair) for pair in zip(restricted_fwd(kernels, x), restricted_fwd_reference(x), strict=True))


def test_a_width_it_does_not_take(kernels: Library) -> None:
    for width in (0, 24, 8208):
        with pytest.raises(StandInError, match=f"multiple of 16 up to 8192, not {width}"):
            restricted_fwd(kernels, sets([1], 3, width, torch.float32))


def test_with_targets_float32_rows_of_7680_are_the_widest(kernels: Library) -> None:
    with pytest.raises(StandInError, match="takes no float32 rows of 7696; use bfloat16 or kernels=reference"):
        restricted_fwd(kernels, sets([1], 3, 7696, torch.float32, soft=True))


def test_rows_that_begin_anywhere(kernels: Library) -> None:
    x = sets([1, 2], 5, 16, torch.float32)
    x.weight = torch.zeros(5 * 16 + 1)[1:].view(5, 16)
    with pytest.raises(StandInError, match="begin at a multiple of 32 bytes; clone weight"):
        restricted_fwd(kernels, x)


@dtypes
@softs
@pytest.mark.parametrize("width", [16, 576, 1024, 2560, 4096, 5120, 8192])
def test_the_tiling_is_what_the_kernel_allocates(kernels: Library, width: int, soft: bool, dtype: torch.dtype) -> None:
    width = 7680 if soft and width == 8192 and dtype == torch.float32 else width
    restricted_fwd(kernels, sets([1], 2, width, dtype, soft=soft))
    rows, outs, size = kernels.tiling("fwd", dtype, width, soft)
    assert 1 <= rows <= 15 and 1 <= outs <= 2
    assert kernels.counters()["buffer"] == size <= 196_608


def budget(x: Sets, blocks: int) -> dict[str, float]:
    """The traffic and instructions that a run may take: the formulas of docs/ascend-kernels.md."""
    n, width, m, _ = x.sizes
    size = x.hidden.element_size()
    rows_read = (m + int((x.offsets.diff() > 0).sum())) * width * size
    soft = x.targets is not None
    tables = 8 * (n + 1) + 4 * m + 8 * n + blocks * 32 * 8 + 4 * m * soft
    return {"mte2_bytes": rows_read + tables, "mte3_bytes": 4 * m + 12 * n + 4 * n * width * (1 + soft)}


@dtypes
@softs
def test_traffic_and_instructions_stay_in_the_budget(kernels: Library, soft: bool, dtype: torch.dtype) -> None:
    x, blocks = sets([58] * 24, 600, 2560, dtype, soft=soft), 4
    restricted_fwd(kernels, x, blocks=blocks)
    used, allowed = kernels.counters(), budget(x, blocks)
    assert all(used[name] <= limit for name, limit in allowed.items())
    assert used["mte2_bytes"] >= 0.999 * (58 * 24 + 24) * 2560 * dtype.itemsize
    n, width, m, _ = x.sizes
    rows = kernels.tiling("fwd", dtype, width, soft)[0]
    tiles = n * -(-58 // rows)
    chunks = width / 64
    per_row = chunks * (2 + (dtype != torch.float32) + soft) + 17  # widen, multiply, mix; then the reduction
    assert used["repeats"] <= m * per_row + tiles * (chunks + 16 + 5 * soft) + n * (chunks + 4) + blocks * 250
    assert used["v"] <= m * (6 + soft) + tiles * (18 + 4 * soft) + n * 4 + blocks * 4
    assert used["mte2"] <= m + n + blocks * 12 + tiles * soft and used["mte3"] <= tiles + (2 + soft) * n
    # the program waits for tables only, never for the vector pipe
    assert used["scalar_waits"] <= 3 * blocks + m / 256 + 2 * n / 256
    shares = [kernels.counters(block)["mte2_bytes"] for block in range(blocks)]
    assert max(shares) <= 1.2 * sum(shares) / blocks


def test_blocks_are_balanced_by_candidates(kernels: Library) -> None:
    x = sets([200] * 20 + [2] * 2000, 300, 64, torch.bfloat16)
    restricted_fwd(kernels, x, blocks=4)
    work = [kernels.counters(block)["mte2_bytes"] for block in range(4)]
    assert max(work) <= 1.15 * sum(work) / 4
