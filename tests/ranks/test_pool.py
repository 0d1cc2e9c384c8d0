"""The rank pool itself: results in rank order, a failed or dead rank reported by name, and recovery."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from pool import fresh


def add() -> float:
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return float(x)


def raises_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("boom")
    dist.all_reduce(torch.ones(1))


def dies_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.all_reduce(torch.ones(1))


def rank() -> tuple[str, str]:
    return os.environ["RANK"], os.environ["WORLD_SIZE"]


def test_results_come_in_rank_order(ranks):
    assert ranks(2).run(add) == [1.0, 1.0]
    assert fresh(3, rank) == [("0", "3"), ("1", "3"), ("2", "3")]


def test_a_failed_rank_is_reported_and_the_pool_recovers(ranks):
    with pytest.raises(AssertionError, match=r"rank 1: [\s\S]*boom"):
        ranks(2).run(raises_on_one)
    assert ranks(2).run(add) == [1.0, 1.0]


def test_a_dead_rank_is_named_within_seconds(ranks):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1: died with exit code 7"):
        ranks(2).run(dies_on_one)
    assert time.monotonic() - begin < 10
