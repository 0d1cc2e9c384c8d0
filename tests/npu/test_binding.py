"""The binding of our kernels, through the real torch-npu's dispatch on npu:0 tensors: forward, backward and an
optimizer's steps.

It is linked with the host stand-in's launchers, so the AscendC kernels themselves compute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runtime import Runtime, make_binding


@pytest.fixture(scope="module")
def module(runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_binding(runtime, tmp_path_factory.mktemp("binding"))


@pytest.fixture(scope="module")
def found(runtime: Runtime, module: Path) -> Any:
    return runtime.run("binding", str(module))


def test_every_operator_is_served(found: Any) -> None:
    assert set(found["live"].values()) == {"compiled"} and len(found["live"]) == 9
    assert {name for name in found["places"]["npu"] if name.startswith("megatron_replay::")} == {
        f"megatron_replay::{name}" for name in found["live"]
    }


@pytest.mark.parametrize("how", ["loss", "soft", "into main_grad"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_the_restricted_loss_and_its_gradients(found: Any, how: str, precision: str, tolerance: float) -> None:
    """Loss, gradient of the hidden states, gradient of the weight.

    A bfloat16 gradient is rounded once more than its tolerance.
    """
    loss, *gradients = found[how][precision]
    assert loss <= 2e-6 and all(far <= tolerance for far in gradients), found[how][precision]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_the_loss_from_logits_and_its_gradient(found: Any, precision: str, tolerance: float) -> None:
    """Logits side by side, a part of wider rows, and every other column; then targets."""
    assert len(found["from logits"][precision]) == 4
    for loss, gradient in found["from logits"][precision]:
        assert loss <= 2e-6 and gradient <= tolerance


def test_a_shard_without_candidates(found: Any) -> None:
    assert found["empty"] == {
        "mixtures": [0.0, 0.0],
        "stats": [[-3e38, -3e38], [0.0, 0.0], [0.0, 0.0]],
        "grad": 0.0,
        "no positions": [0, [3, 0]],
    }


def test_the_gradient_as_touched_rows(found: Any) -> None:
    assert found["touched rows"] <= 2e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_selection_is_in_order(found: Any, precision: str) -> None:
    said = found["selection"][precision]
    assert said["values"] and said["columns"] and said["strided"] and said["lse"] < 1e-5
    assert said["types"] == ["torch.float32", "torch.int64", "torch.float64"]


@pytest.mark.parametrize("run", ["fp32", "bf16", "main weights"])
def test_moclip(found: Any, run: str) -> None:
    said = found["main weights"] if run == "main weights" else found["moclip"][run]
    low = run != "fp32"
    assert said["params"] <= (1e-2 if low else 1e-5) and said["norm"] <= 1e-6 and said["metrics"] <= 1e-4
    assert {"exp_avg", "exp_avg_sq"} <= said["state"].keys() and all(far <= 1e-5 for far in said["state"].values()), (
        said
    )
    assert ("main" in said["state"]) is (run == "main weights")


def test_arguments_it_cannot_take_are_named(found: Any) -> None:
    said = found["refusals"]
    assert said["float16"] == "hidden is Half; the NPU's kernels take float32 and bfloat16"
    assert said["one on the cpu"] == "columns lies on cpu, expected an NPU"
    assert said["offsets too short"] == "offsets has shape [2], expected [3]"
    assert said["columns int64"] == "columns is Long, expected Int"
    assert "16" in said["width"] and "30" in said["width"]
    assert said["logits float64"] == "logits is Double; the NPU's kernels take float32 and bfloat16"
    assert said["logits float16"] == "logits is Half; the NPU's kernels take float32 and bfloat16"
    assert said["logits of other positions"] == "logits has shape [1, 70], expected [2, 70]"
    assert said["gold on the cpu"] == "gold lies on cpu, expected an NPU"
    assert said["scalars of two"] == "scalars has shape [2, 2], expected [3, 2]"
    assert said["z bfloat16"] == "z is BFloat16, expected Float"
    assert said["targets of another number"] == "targets has shape [1], expected [2]"
    assert said["targets bfloat16"] == "targets is BFloat16, expected Float"
    assert said["targets on the cpu"] == "targets lies on cpu, expected an NPU"
    assert said["strided gradient"] == "the gradient of the logits must be contiguous: it is changed in place"


def test_the_whole_step_with_the_compiled_operators(runtime: Runtime, module: Path, on_npu: Any) -> None:
    """As test_step.py has it, with the extension in the package's place."""
    found = runtime.run("step", "npu", "fp32,bf16", "", str(module))
    assert set(found["ours"].values()) == {"compiled"} and set(on_npu["ours"].values()) == {"reference"}
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
        for ours, theirs in zip(found["steps"][precision], on_npu["steps"][precision], strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=tolerance), precision
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=tolerance), precision
    assert list(found["places"]) == ["cpu", "npu"]
