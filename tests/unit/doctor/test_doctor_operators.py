"""`doctor --ops`: the operators of a tiny collect and train, in a process of its own, since a model changes torch's
surroundings."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_replay.doctor.operators import Seen


def doctor(*words: str) -> Any:
    command = [sys.executable, "-m", "megatron_replay", "doctor", "--ops", "--json", "device=cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)["operators"]


@pytest.mark.slow
def test_on_the_cpu_all_run_on_the_cpu() -> None:
    found = doctor("kernels=reference")
    assert list(found) == ["cpu"]
    asked = found["cpu"]
    for name in ("aten::mm", "aten::index_add_", "aten::topk", "aten::atan2.out"):
        assert asked[name] > 0, name
    assert not any(name.startswith("megatron_replay::") for name in asked), "plain torch is seen as what it asks for"
    assert list(asked.values()) == sorted(asked.values(), reverse=True)


def test_an_operator_that_is_a_name_for_others_is_not_counted() -> None:
    seen = Seen()
    with torch.inference_mode(), seen:
        torch.ones(2, 3).to(torch.float64).diff()
    (place,) = seen.by_device()
    asked = seen.by_device()[place]
    assert place == "cpu" and "aten::_to_copy" in asked and not {"aten::to.dtype", "aten::diff"} & asked.keys()
