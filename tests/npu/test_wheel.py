"""Every name of torch-npu that our code uses exists in the real wheel, and the device seam finds the NPU through it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runtime import ROOT, VERSION, Runtime

PACKAGE = ROOT / "megatron_replay"
OPERATOR = re.compile(r"\bnpu_[a-z_]+\b")
NOT_OPERATORS = {"npu_extension"}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    yield from ((path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py")))


def operators() -> set[str]:
    """All names that look like one of torch-npu's operators, in code and docstrings alike."""
    found = {name for path, _ in modules() for name in OPERATOR.findall(path.read_text(encoding="utf-8"))}
    return found - NOT_OPERATORS


def attributes() -> set[str]:
    """The names that device.py takes of the device's module: `.module.NAME`."""
    found = set()
    for path, tree in modules():
        for node in ast.walk(tree):
            if (
                path.name == "device.py"
                and isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr == "module"
            ):
                found.add(node.attr)
    return found


def torch_npu_modules() -> set[str]:
    literals = {
        node.value
        for _, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {text for text in literals if re.fullmatch(r"torch_npu(\.\w+)*", text)}


@pytest.fixture(scope="module")
def found(runtime: Runtime) -> Any:
    asked = {
        "operators": sorted(operators()),
        "attributes": sorted(attributes()),
        "modules": sorted(torch_npu_modules()),
    }
    return runtime.run("wheel", json.dumps(asked))


def test_the_names_are_found_in_our_code() -> None:
    assert operators() == {"npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul"}
    assert {"set_device", "device_count", "mem_get_info", "max_memory_allocated", "get_device_name"} <= attributes()
    assert torch_npu_modules() == {"torch_npu", "torch_npu.contrib.transfer_to_npu", "torch_npu.profiler"}


def test_every_name_exists_in_the_wheel(found: Any) -> None:
    assert found["version"].startswith(VERSION)
    assert found["operators"] == found["attributes"] == found["modules"] == []


def test_the_fused_operators_take_our_arguments(found: Any) -> None:
    """Their meta kernels, which also say the shapes; and all have a gradient."""
    assert found["meta"] == {
        "npu_fusion_attention": [10, 4, 16],
        "npu_fusion_attention, masked": [1, 3, 4, 16],
        "npu_rms_norm": [10, 1, 64],
        "npu_rotary_mul": [10, 1, 4, 16],
    }
    assert found["differentiable"] == []


def test_the_device_seam_finds_the_npu(found: Any) -> None:
    assert found["devices"] == ["npu", "cpu"] and found["default"] == "npu" and found["precision"] == "torch.bfloat16"
    assert found["count"] == 1 and found["model"].startswith("Ascend910B")
    assert 0 < found["memory"][0] <= found["memory"][1] and found["peak"] > 0
    assert found["tensor"] == ["npu:0", [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]]


def test_without_our_extension_plain_torch_answers(found: Any) -> None:
    assert set(found["ours"].values()) == {"reference"}


def test_a_fallback_to_the_cpu_is_seen(found: Any) -> None:
    """segment_reduce is one: torch-npu 2.13.0 has no kernel for it, which is why ours does without on an NPU."""
    assert found["places"] == {
        "aten::add.Tensor": "npu",
        "aten::index_add_": "npu",
        "aten::detach": "npu",
        "aten::segment_reduce": "cpu instead of npu",
    }


def test_the_runtime_computes_nothing(found: Any) -> None:
    """It would be no memory-only runtime otherwise: an operator of torch-npu's own is refused, by name."""
    assert "memory-only ACL: aclopCompileAndExecute is not emulated" in found["add"]
    assert "error code is 107001" in found["second device"]  # ACL_ERROR_RT_INVALID_DEVICEID
