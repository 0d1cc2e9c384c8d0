"""The optimizer's form in a checkpoint is one and the same for every version of megatron-core, whoever writes it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, Outcome, Whole, run, same
from models import QWEN3, write_folder
from test_resume import FOUR, HALF, go_on, stop

from megatron_replay.formats.torch_dist import Reader
from megatron_replay.parallel import shims
from megatron_replay.parallel.mcore import zero1

CONFIG = {**QWEN3, "num_hidden_layers": 2, "tie_word_embeddings": True}
OLD = Path(sys.prefix) / "megatron-0.12"
"""The folder where `make test-megatron-0.12` puts the old version."""
BETWEEN: tuple[dict[str, Any], ...] = ({**FOUR, "replicas": 2}, {"pipeline": 2, "replicas": 2})


def by_hand(job: Job, function: Any, root: str) -> Outcome:
    """On a rank: `function`, as if this megatron did not know the form."""
    shims.import_megatron()
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for name in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
        if hasattr(DistributedOptimizer, name):
            delattr(DistributedOptimizer, name)
    outcome: Outcome = function(job, root)
    return outcome


def by_megatron(job: Job, function: Any, root: str) -> Outcome:
    outcome: Outcome = function(job, root)
    return outcome


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(folder=str(write_folder(tmp_path_factory.mktemp("tiny"), CONFIG)), steps=2 * HALF)


@pytest.mark.slow
@pytest.mark.parametrize(("writes", "reads"), [(by_hand, by_megatron), (by_megatron, by_hand)])
def test_what_one_writes_the_other_reads(job: Job, tmp_path: Path, writes: Any, reads: Any) -> None:
    shims.import_megatron()
    if shims.within(here := shims.megatron_version(), ">=0.12,<0.15"):
        pytest.skip(f"megatron-core {here} does not know the form; see the test between versions")
    first = run(dataclasses.replace(job, steps=HALF).on(**BETWEEN[0]), writes, stop, str(tmp_path / "ours"))
    run(dataclasses.replace(job, steps=HALF).on(**BETWEEN[0]), by_megatron, stop, str(tmp_path / "theirs"))
    ours, theirs = (Reader(tmp_path / root)._metadata.state_dict_metadata for root in ("ours", "theirs"))
    assert {key: getattr(entry, "size", None) for key, entry in ours.items()} == {
        key: getattr(entry, "size", None) for key, entry in theirs.items()
    }
    second = run(
        dataclasses.replace(job, first=HALF, steps=HALF).on(**BETWEEN[1]), reads, go_on, str(tmp_path / "ours")
    )
    same(Whole([*first.steps, *second.steps], second.weights), run(job))


def half(folder: str, root: str, first: str) -> None:
    """In a process of its own: a half of the run, the second compared with a run that never stopped."""
    job = Job(folder=folder, steps=2 * HALF)
    if first == "True":
        run(dataclasses.replace(job, steps=HALF).on(**BETWEEN[0]), stop, root)
    else:
        second = run(dataclasses.replace(job, first=HALF, steps=HALF).on(**BETWEEN[1]), go_on, root)
        truth = run(job)
        same(second, Whole(truth.steps[HALF:], truth.weights))
    print(f"with {shims.megatron_version()}")


@pytest.mark.parametrize("old_first", [True, False], ids=["0.12 first", "0.12 second"])
def test_a_run_goes_on_with_another_version(job: Job, tmp_path: Path, old_first: bool) -> None:
    if not OLD.is_dir():
        pytest.skip("make test-megatron-0.12 installs the other version")
    folders = [str(folder) for folder in Path(__file__).parents[:2]]
    code = f"import sys; sys.path[:0] = {folders!r}; import test_zero1; test_zero1.half(*sys.argv[1:])"
    said = []
    for first in (True, False):
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables |= {"PYTHONPATH": str(OLD)} if old_first == first else {}
        command = [sys.executable, "-W", "ignore", "-c", code, job.folder, str(tmp_path), str(first)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=variables)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split()[-1])
    old, new = said if old_first else said[::-1]
    assert old.startswith("0.12.") and not new.startswith("0.12."), said


def test_parameter_groups_are_told_apart_by_what_they_are() -> None:
    """A stage that meets a norm first has them in another order than the first stage, which saves them."""
    matrices = {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    norms = {**matrices, "wd_mult": 0.0}
    saved = [{**matrices, "weight_decay": 0.1}, {**norms, "weight_decay": 0.0}]
    assert zero1.in_order(saved, [norms, matrices]) == saved[::-1]
    assert zero1.in_order(saved, [matrices, norms]) == saved
    assert zero1.in_order(saved[:1], [matrices]) == saved[:1]
    # what a rank keeps of its own parameters stays where it is
    numbered = [{**group, "params": [number]} for number, group in enumerate(saved)]
    assert [group["params"] for group in zero1.in_order(numbered, [norms, matrices])] == [[0], [1]]
