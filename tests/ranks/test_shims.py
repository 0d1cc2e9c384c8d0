"""Every change to megatron's surroundings is still needed: without it a short job fails or leaves something behind.

There is one test a shim. When a test here says that a shim is not needed any more, delete the shim, or restrict it to
the versions that need it. A shim that names other versions than the installed one is not applied. So the jobs that run
with all shims show that this version does not need it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import Job, Outcome, advance, opened, run, same, whole
from models import QWEN3, write_folder
from pool import fresh

from megatron_replay.config import Layout
from megatron_replay.device import CPU
from megatron_replay.models.weights import EMBEDDING
from megatron_replay.parallel import shims
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.trainer import make_trainer

CUDA = "Torch not compiled with CUDA enabled"
FOUR: dict[str, Any] = {"tensor": 2, "pipeline": 2}
NEEDED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "current_device": (FOUR, False, CUDA),
    "factories": (FOUR, False, CUDA),
    "synchronize": (FOUR, False, CUDA),
    "rng": (FOUR, False, CUDA),
    "tensor_cuda": (FOUR, False, CUDA),
    "tensor_type": (FOUR, False, "Wrapped parameters must be one of torch.cuda.FloatTensor"),
    "group_step": ({"replicas": 2}, True, "KeyError: 'step'"),
    "results_queue": ({}, True, "a process was left behind"),
    "save_here": ({}, True, "results_queue should not be empty"),
    "write_format": ({}, True, "missing 1 required positional argument: 'serialization_format'"),
    "frozen_embedding": (FOUR, False, "Expected parameter `tensor` of type torch.Tensor"),
    "no_fp8": ({"replicas": 2}, False, "Invalid Transformer Engine version for FP8 distributed optimizer"),
}
"""Shim -> layout of the job, whether it saves and loads, and what goes wrong without the shim."""
ALL = ">=0.12,<0.17"
PRIVATE = [
    ("tensor_parallel.random", "_set_cuda_rng_state", ALL),
    ("tensor_parallel.random", "_get_cuda_rng_state", ALL),
    ("tensor_parallel.random", "_MODEL_PARALLEL_RNG_TRACKER_NAME", ALL),
    ("tensor_parallel.random", "CudaRNGStatesTracker", ALL),
    ("optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", ALL),
    ("optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", ">=0.14,<0.17"),
    ("optimizer.distrib_optimizer", "quantize_param_shard", ALL),
    ("dist_checkpointing.strategies.base", "AsyncSaveShardedStrategy", ALL),
    ("dist_checkpointing.strategies.filesystem_async", "_get_write_results_queue", ALL),
]


def attempt(job: Job, without: str, saved: str) -> Outcome:
    """On a rank: the job with one shim missing; saved: then save into this folder, and load into a new trainer."""
    shims.install(CPU, skip={without})
    with opened(job.folder, job.layout) as model:
        if without == "frozen_embedding":
            model.freeze([EMBEDDING])
        trainer = make_trainer(model, job.optimizer)
        outcome = advance(job, trainer)
        if saved:
            try:
                checkpoint.save(Path(saved), job.steps, trainer, {"iteration": job.steps})
            finally:
                left = multiprocessing.active_children()
                for process in left:
                    process.kill()
            assert not left, "a process was left behind"
            checkpoint.load(Path(saved), make_trainer(model, job.optimizer))
        return outcome


def not_here(versions: str) -> None:
    """Skip where this megatron-core is not one of these versions."""
    shims.import_megatron()
    if not shims.within(here := shims.megatron_version(), versions):
        pytest.skip(f"megatron-core {here}, the subject is of {versions}")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Tied: on two pipeline stages the head is a copy of the embedding."""
    config = {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return Job(folder=str(write_folder(tmp_path_factory.mktemp("tiny"), config)), steps=2)


@pytest.mark.parametrize("layout", [FOUR, {"replicas": 2}], ids=str)
def test_with_all_shims_the_jobs_run(job: Job, layout: dict[str, Any], tmp_path: Path) -> None:
    there = job.on(**layout)
    same(whole(fresh(there.ranks, attempt, there, "", str(tmp_path))), run(job))


@pytest.mark.parametrize("shim", shims.catalog(CPU), ids=lambda shim: shim.name)
def test_without_the_shim_the_job_fails(job: Job, shim: shims.Shim, tmp_path: Path) -> None:
    not_here(shim.versions)
    layout, saves, failure = NEEDED[shim.name]
    there = job.on(**layout)
    try:
        fresh(there.ranks, attempt, there, shim.name, str(tmp_path) if saves else "")
    except AssertionError as err:
        assert failure in str(err), f"without {shim.name} something else went wrong than expected: {err}"
    else:
        pytest.fail(f"shim {shim.name} is not needed any more: remove it")


def forked_dropout(shimmed: bool) -> dict[str, Any]:
    """On a rank: what dropout draws inside megatron's forked generator, and whether recomputation draws the same
    again."""
    tp_random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    plain = tp_random.CudaRNGStatesTracker.fork, tp_random._set_cuda_rng_state
    with world.running(Layout(tensor=2), CPU):
        if not shimmed:
            tp_random.CudaRNGStatesTracker.fork, tp_random._set_cuda_rng_state = plain
        tracker = tp_random.get_cuda_rng_tracker()

        def drop(x: torch.Tensor) -> torch.Tensor:
            with tracker.fork():
                return F.dropout(x, 0.5)

        outside = torch.get_rng_state()
        first, second = drop(torch.ones(64)), drop(torch.ones(64))
        unmoved = torch.equal(outside, torch.get_rng_state())
        x = torch.ones(256, requires_grad=True)
        out = tp_random.checkpoint(drop, False, x)
        drop(torch.ones(8))  # between forward and backward other things are drawn
        out.sum().backward()
        again = x.grad is not None and torch.equal(x.grad, out.detach())
        return {"first": first.tolist(), "second": second.tolist(), "unmoved": unmoved, "again": again}


def test_dropout_is_forked_and_recomputed() -> None:
    """The shim `rng` is needed where nothing fails: without it dropout would silently be another one."""
    ours, theirs = fresh(2, forked_dropout, True)
    assert ours["first"] != theirs["first"], "tensor ranks drop different units"
    assert ours["first"] != ours["second"]
    assert ours["unmoved"] and theirs["unmoved"] and ours["again"] and theirs["again"]
    ours, theirs = fresh(2, forked_dropout, False)
    assert ours["first"] == theirs["first"] and not ours["unmoved"], (
        "shim rng need not replace fork any more: simplify it"
    )


@pytest.mark.parametrize(("module", "name", "versions"), PRIVATE)
def test_the_private_names_we_touch_exist(module: str, name: str, versions: str) -> None:
    not_here(versions)
    assert hasattr(importlib.import_module(f"megatron.core.{module}"), name)


def test_the_table_is_complete() -> None:
    """Each shim has its test here, and says what, why and for which versions."""
    catalog = shims.catalog(CPU)
    assert {shim.name for shim in catalog} == NEEDED.keys() and len(catalog) == len(NEEDED)
    assert all(shim.where and shim.why for shim in catalog)
    only_old: dict[str, set[str]] = {"0.12.1": {"save_here", "write_format", "frozen_embedding", "no_fp8"}}
    only_old |= {"0.13.1": {"save_here"}, "0.14.0": {"save_here"}, "0.15.3": set(), "0.16.1": set()}
    always = NEEDED.keys() - only_old["0.12.1"]
    for version, added in only_old.items():
        assert {shim.name for shim in shims.table(CPU, version)} == always | added, version
    assert not shims.table(CPU, "0.17.0") and not shims.table(CPU, "0.11.0")


IMPORT_ALL = """
import importlib, pkgutil, sys, types, torch, torch.distributed, torch.distributed.checkpoint
def seen():
    modules = {"torch": torch, "torch.cuda": torch.cuda, "torch.distributed": torch.distributed}
    found = {}
    for place, owner in modules.items():
        found |= {(place, name): value for name, value in vars(owner).items() if callable(value)}
    inherited = {("Tensor", name): getattr(torch.Tensor, name) for name in dir(torch.Tensor)}
    return found | {key: value for key, value in inherited.items() if callable(value)}
before = seen()
import megatron_replay
found = pkgutil.walk_packages(megatron_replay.__path__, "megatron_replay.")
names = [m.name for m in found if not m.name.endswith("__main__")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as err:
        optional = {"triton": ".triton_", "lm_eval": ".harness"}
        assert optional.get(err.name, "none") in name, (name, err)
after = seen()
assert len(names) > 60, names
changed = [key for key, value in before.items() if after.get(key) != value]
assert not changed, f"changed by importing: {changed}"
early = [name for name in sys.modules if name.split(".")[0] in ("megatron", "torch_npu")]
assert not early, "megatron was imported before its shims"
from megatron_replay.device import CPU
from megatron_replay.models.weights import EMBEDDING
from megatron_replay.parallel import shims
shims.install(CPU)
now = seen()
print(sorted(".".join(key) for key, value in before.items() if now.get(key) != value))
"""


def test_importing_patches_nothing_and_install_does() -> None:
    """All modules of the package, in a process of their own; then, so that the comparison is known to see a patch,
    `install`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_ALL], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {"'Tensor.cuda'", "'Tensor.type'", "'torch.cuda.current_device'", "'torch.zeros'"} <= set(
        done.stdout.strip(" []\n").split(", ")
    )
