"""Stage 0 and training on npu:0, through the real torch-npu, megatron-core and our seam between them, against the same
on the cpu.

What is real: torch-npu's Python, its dispatch, autograd, allocator and `transfer_to_npu`; megatron-core; our shims.
What is not: the arithmetic of torch's operators (the host's), of the fused operators (documented.py) and of HCCL (one
process, over gloo).
"""

from __future__ import annotations

from typing import Any

import pytest
from runtime import Runtime

from megatron_replay.device import CUDA, NPU
from megatron_replay.parallel import shims


@pytest.fixture(scope="module")
def on_cpu(runtime: Runtime) -> Any:
    return runtime.run("step", "cpu", "fp32", "", "")


@pytest.mark.parametrize("run", ["fp32", "tree"])
def test_two_steps_are_those_of_the_cpu(on_npu: Any, on_cpu: Any, run: str) -> None:
    """The cpu computes each sample by itself."""
    for ours, theirs in zip(on_npu["steps"][run], on_cpu["steps"]["fp32"], strict=True):
        assert ours["positions"] == theirs["positions"] > 0 and ours["applied"] and theirs["applied"]
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        # degrees: the steps see the same batch, and the arc cosine of nearly 1 is not well determined
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4, abs=0.01)


def test_bf16_with_fp32_main_weights(on_npu: Any, on_cpu: Any) -> None:
    for ours, theirs in zip(on_npu["steps"]["bf16"], on_cpu["steps"]["fp32"], strict=True):
        assert ours["applied"] and ours["loss"] == pytest.approx(theirs["loss"], rel=0.03)


def test_no_operator_is_left_to_the_cpu(on_npu: Any, on_cpu: Any) -> None:
    """By torch-npu's own registrations: none of these operators lacks a kernel for the NPU."""
    assert list(on_npu["places"]) == ["cpu", "npu"], on_npu["places"]
    assert list(on_cpu["places"]) == ["cpu"]
    asked = on_npu["places"]["npu"]
    for fused in (
        "npu_fusion_attention",
        "npu_fusion_attention_grad",
        "npu_rms_norm",
        "npu_rms_norm_backward",
        "npu_rotary_mul",
    ):
        assert asked[f"npu::{fused}"] >= 2, fused
    assert not any("scaled_dot_product" in name for name in asked)


@pytest.mark.parametrize(
    ("shim", "failure"),
    [
        ("tensor_type", "Wrapped parameters must be one of torch.cuda.FloatTensor"),
        ("capability", "object is not subscriptable"),
    ],
)
def test_without_the_shim_the_step_fails(runtime: Runtime, shim: str, failure: str) -> None:
    with pytest.raises(AssertionError, match=failure):
        runtime.run("step", "npu", "fp32", shim, "")


def test_without_the_fused_rotation_megatrons_own_runs(runtime: Runtime, on_npu: Any) -> None:
    """The one shim that nothing fails without: what it changes is which operators run."""
    found = runtime.run("step", "npu", "fp32", "rotary", "")
    assert "npu::npu_rotary_mul" not in found["places"]["npu"]
    assert found["steps"]["fp32"][-1]["loss"] == pytest.approx(on_npu["steps"]["fp32"][-1]["loss"], rel=1e-5)


def test_each_shim_of_the_npu_has_its_test() -> None:
    common = {shim.name for shim in shims.catalog(CUDA)}
    assert {shim.name for shim in shims.catalog(NPU)} - common == {"tensor_type", "capability", "rotary"}
