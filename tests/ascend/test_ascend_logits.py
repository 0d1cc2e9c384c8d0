"""logits_fwd and logits_bwd on the stand-in against plain torch."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, Sets, close, logits_bwd, logits_fwd, sets
from stand_in import Library
from torch import Tensor

from megatron_replay.kernels import torch_twins as plain

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
softs = pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
CASES = {
    "sizes": ([1, 2, 0, 63, 64, 65, 200, 0, 3], 300, 300),
    "a part of wider rows": ([5, 40, 7], 101, 128),
    "no positions": ([], 50, 50),
    "one position": ([11], 50, 50),
    "empty": ([0, 0], 30, 30),
    "two windows": ([2] * 400, 40, 40),
}


def inputs(
    case: str, dtype: torch.dtype, tied: bool = False, soft: bool = False
) -> tuple[Tensor, Sets, Tensor, Tensor]:
    """logits, sets, and z and stats as plain torch has them."""
    sizes, vocab, stride = CASES[case]
    x = sets(sizes, vocab, 16, dtype, soft=soft)
    logits = (torch.randn(len(sizes), stride, generator=torch.Generator().manual_seed(3)) * 10).to(dtype)
    if tied:
        logits.fill_(2.5)
    return logits, x, *plain.restricted_logits_fwd(logits, *x.tables, x.targets)


@dtypes
@softs
@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_reference(kernels: Library, case: str, soft: bool, dtype: torch.dtype) -> None:
    logits, x, z, stats = inputs(case, dtype, soft=soft)
    found = logits_fwd(kernels, logits, x)
    assert torch.equal(found[0], z) and close(found[1], stats)


@dtypes
@softs
@pytest.mark.parametrize("case", CASES)
def test_backward_is_the_reference(kernels: Library, case: str, soft: bool, dtype: torch.dtype) -> None:
    _, x, z, stats = inputs(case, dtype, soft=soft)
    n, gen = len(x.gold), torch.Generator().manual_seed(4)
    scalars = torch.stack([stats[0] + 0.5, torch.rand(n, generator=gen), torch.rand(n, generator=gen)])
    (found,) = logits_bwd(kernels, z, x, scalars, dtype)
    wanted = torch.zeros_like(found)
    plain.restricted_logits_bwd(z, *x.tables, scalars, wanted, x.targets)
    assert close(found, wanted, 2e-6 if dtype == torch.float32 else 2**-8)


def test_a_set_of_65535(kernels: Library) -> None:
    x = sets([65_535], 65_600, 16, torch.float32)
    logits = torch.randn(1, 65_600, generator=torch.Generator().manual_seed(3))
    found, (z, stats) = logits_fwd(kernels, logits, x), plain.restricted_logits_fwd(logits, *x.tables)
    assert torch.equal(found[0], z) and close(found[1], stats, 2e-5)


@dtypes
def test_tied_logits(kernels: Library, dtype: torch.dtype) -> None:
    logits, x, _, _ = inputs("sizes", dtype, tied=True)
    _, stats = logits_fwd(kernels, logits, x)
    assert stats[1].tolist() == x.offsets.diff().tolist()


@dtypes
@softs
def test_blocks_and_their_order_change_no_bit(kernels: Library, soft: bool, dtype: torch.dtype) -> None:
    logits, x, z, stats = inputs("sizes", dtype, soft=soft)
    first = None
    for blocks in (1, 2, 3, 8, 40):
        for backwards in (False, True):
            how = {"blocks": blocks, "backwards": backwards}
            found = (*logits_fwd(kernels, logits, x, **how), *logits_bwd(kernels, z, x, stats, dtype, **how))
            first = first or found
            assert all(torch.equal(*pair) for pair in zip(found, first, strict=True))


@dtypes
@softs
def test_traffic_and_instructions_stay_in_the_budget(kernels: Library, soft: bool, dtype: torch.dtype) -> None:
    n, size, blocks = 60, 58, 4
    x = sets([size] * n, 400, 16, dtype, soft=soft)
    logits, m = torch.randn(n, 400).to(dtype), n * size
    z, stats = logits_fwd(kernels, logits, x, blocks=blocks)
    used = kernels.counters()
    tables = 8 * (n + 1) + 4 * m + 8 * n + blocks * 64 + 4 * m * soft
    assert used["mte2_bytes"] <= m * dtype.itemsize + tables and used["mte3_bytes"] == 4 * m + 12 * n
    assert used["mte2"] <= m + blocks * 12 + m / 256 + n * soft and used["mte3"] <= 2 * n
    assert used["v"] <= (16 + 3 * soft) * n + 4 * blocks and used["repeats"] <= n * 40 + blocks * 16
    logits_bwd(kernels, z, x, stats, dtype, blocks=blocks)
    used = kernels.counters()
    assert used["mte2_bytes"] <= 4 * m + tables + 12 * n and used["mte3_bytes"] == m * dtype.itemsize
    assert used["mte3"] == m and used["v"] <= (6 + soft) * n + blocks and used["repeats"] <= n * 14 + blocks
