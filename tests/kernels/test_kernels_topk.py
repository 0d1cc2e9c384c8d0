"""The compiled selection against a stable sort: exactly the same values and columns, whatever ties there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_replay.kernels.library import choose

pytestmark = pytest.mark.usefixtures("compiled")
OURS, PLAIN = choose("auto").topk_rows, choose("reference").topk_rows
KINDS = [
    "normal",
    "peaked",
    "bf16",
    "integer",
    "few",
    "equal",
    "signed zeros",
    "double",
    "mostly forbidden",
    "one block",
    "rising",
]


def rows(kind: str, n: int, width: int, seed: int = 0) -> Tensor:
    z = torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 3
    forbidden = z.masked_fill(z.abs() > 0.1, -torch.inf)
    return {
        "normal": z,
        "peaked": z * 30,
        "bf16": z.bfloat16(),
        "integer": z.round(),
        "few": z.sign(),
        "equal": z * 0 + 2,
        "signed zeros": torch.where(z > 0, 0.0, -0.0),
        "double": z.double() + torch.arange(width) * 1e-12,
        "mostly forbidden": forbidden,
        "one block": z + 50 * (torch.arange(width) // 64 == 1),
        "rising": z + torch.linspace(0, 900, width),  # nearly every block has a new maximum
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("width", "k"), [(20_000, 200), (4097, 3), (999, 40), (7, 7), (130, 200), (64, 1), (65, 64), (1, 1), (13_000, 300)]
)
def test_the_top_is_that_of_a_stable_sort(kind: str, width: int, k: int) -> None:
    logits = rows(kind, 9, width)
    values, columns, lse = OURS(logits, k)
    wide, order = logits.to(values.dtype).sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, order[:, :k])
    assert torch.equal(values, wide[:, :k]) and torch.equal(values.signbit(), logits.gather(1, columns).signbit())
    torch.testing.assert_close(lse, torch.logsumexp(logits.double(), 1), atol=1e-13, rtol=1e-14)
    plain = PLAIN(logits, k)
    assert torch.equal(values, plain[0]) and torch.equal(columns, plain[1])
    torch.testing.assert_close(lse, plain[2], atol=1e-13, rtol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_instruction_sets_give_the_same_bits(
    kind: str, with_isa: Callable[[str], bool], with_threads: Callable[[int], None]
) -> None:
    logits = rows(kind, 17, 5003)
    runs = []
    for isa in ("baseline", "avx2", "avx512"):
        for threads in (1, 2, 3):
            with_threads(threads)
            if with_isa(isa):
                runs.append(OURS(logits, 50))
    assert runs and all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_a_row_alone_has_the_bits_it_has_among_others() -> None:
    logits = rows("normal", 40, 3001)
    whole = OURS(logits, 20)
    for t in range(40):
        assert all(torch.equal(a[t : t + 1], b) for a, b in zip(whole, OURS(logits[t : t + 1], 20), strict=True))


def test_views_and_nothing() -> None:
    logits = rows("normal", 12, 700)
    wanted = OURS(logits[:, :650].contiguous(), 30)
    for view in (logits[:, :650], logits.t().contiguous().t()[:, :650]):
        assert all(map(torch.equal, OURS(view, 30), wanted))
    values, columns, lse = OURS(logits[:0], 30)
    assert values.shape == columns.shape == (0, 30) and lse.shape == (0,)
    values, columns, lse = OURS(logits[:, :0], 30)
    assert values.shape == columns.shape == (12, 0) and lse.eq(-torch.inf).all()


@pytest.mark.parametrize("at", [0, 63, 64, 650, 699])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_broken_row_has_no_log_sum_exp(at: int, dtype: torch.dtype) -> None:
    logits = rows("peaked", 5, 700).to(dtype)
    logits[1, at], logits[2, at], logits[3] = torch.nan, torch.inf, -torch.inf
    lse = OURS(logits, 20)[2]
    assert (
        lse.isfinite().tolist() == [True, False, False, False, True]
        and lse[1].isnan()
        and lse[2].isnan()
        and lse[3] == -torch.inf
    )


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="k is 0"):
        OURS(torch.zeros(2, 5), 0)
    with pytest.raises(RuntimeError, match="must be a matrix"):
        OURS(torch.zeros(5), 2)
    with pytest.raises(RuntimeError, match="compiled for float32"):
        OURS(torch.zeros(2, 5).half(), 2)
