"""No rank asks for a sum or a maximum in float64.

HCCL has none on Atlas A2, where HcclAllReduce takes int8 to int64, fp16, bf16, fp32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, train
from models import QWEN3, write_folder
from pool import fresh
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reductions(TorchDispatchMode):
    """Notes the dtypes of the tensors that collectives add up or compare."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "reduce" in func._schema.name:
            self.found |= {
                (func._schema.name, str(x.dtype)) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
            }
        return func(*args, **(kwargs or {}))


def reductions(job: Job) -> set[tuple[str, str]]:
    """On a rank: what a run reduces."""
    with Reductions() as seen:
        train(job)
    return seen.found


@pytest.mark.parametrize("optimizer", ["moclip", "mofo"])
def test_no_reduction_in_float64(optimizer: str, tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "tiny", {**QWEN3, "num_hidden_layers": 2}))
    job = Job(folder=folder, steps=2, dtype=torch.bfloat16).on(tensor=2, replicas=2)
    job = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, name=optimizer, options={}))
    found = set().union(*fresh(job.ranks, reductions, job))
    assert {name for name, _ in found} >= {"c10d::allreduce_"}, "the ranks reduce something"
    assert {dtype for _, dtype in found} <= {"torch.float32", "torch.bfloat16", "torch.int32", "torch.int64"}, found
