"""tools/npu_selftest.sh, which a user runs on an NPU, runs here on the cpu; and what it must notice, it notices."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_replay.device import CPU, available
from megatron_replay.kernels import library
from megatron_replay.kernels.schemas import OPERATORS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def selftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("selftest", ROOT / "tools" / "selftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(library.EXTENSION != "loaded", reason="the compiled kernels are not built")
def test_the_script_writes_its_report_on_the_cpu(tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "DEVICE": "cpu", "BUILD": "no", "PATH": path}  # `make venv` built them
    done = subprocess.run(
        ["bash", ROOT / "tools" / "npu_selftest.sh", report],
        env=environ,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    text = report.read_text()
    assert done.returncode == 0, text
    assert done.stdout == text and "WRONG" not in text
    verdict = text.split("== verdict\n")[1].splitlines()
    assert verdict == [
        "driver: skipped: npu-smi needs an NPU (DEVICE=cpu)",
        "build: skipped: BUILD=no: the kernels that are installed are used",
        *(f"{part}: right" for part in ("doctor", "kernels", "collectives", "golden", "timings")),
    ]
    operators = [line for line in text.splitlines() if " compiled  right: off by " in line]
    assert {line.split()[0] for line in operators} == set(OPERATORS)
    assert len(operators) == 3 * len(OPERATORS), "float32, bfloat16 and float64"
    assert text.count(" right: loss and gradient norm of ten steps") == 4 and text.count("over gloo") == 8


@pytest.mark.skipif(library.EXTENSION != "loaded", reason="the compiled kernels are not built")
def test_a_wrong_kernel_is_noticed(
    selftest: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, calls = library.choose(), itertools.count()

    def rows(*args: Any) -> Any:
        return ours.restricted_bwd_rows(*args) * 1.001

    def refuses(*args: Any) -> None:
        raise RuntimeError("mixture is Half")

    def restless(logits: torch.Tensor, k: int) -> Any:
        values, columns, lse = ours.topk_rows(logits, k)
        return values, columns, lse * (1 + 1e-15 * next(calls))

    broken = {
        "restricted_bwd_dh": refuses,
        "restricted_bwd_dw": lambda *_: None,
        "restricted_bwd_rows": rows,
        "topk_rows": restless,
    }
    monkeypatch.setattr(selftest.library, "choose", lambda mode: dataclasses.replace(ours, **broken))
    assert selftest.kernels(CPU) == 1
    wrong = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert [name for name, *_ in wrong] == list(broken) * 3
    refused, nothing, off, other = (said for *_, said in wrong[:4])
    assert "no positions: RuntimeError: mixture is Half" in refused and "few rows, often: off by 1.0e+00" in nothing
    assert "few rows, often: off by 1.0e-03" in off and "no positions" not in off
    assert other.endswith("5000 columns: other bits the second time")


def test_other_losses_are_noticed(
    selftest: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "train", lambda *args: [(2.85146136, 3.20509927)] * 10)
    assert selftest.golden(CPU) == 1
    assert capsys.readouterr().out.count("WRONG") == 4


def test_a_device_that_is_not_here_is_wrong(
    selftest: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if any(device.name == "npu" for device in available()):
        pytest.skip("this machine has an NPU")
    monkeypatch.setattr(sys, "argv", ["selftest.py", "--device", "npu", "kernels"])
    assert selftest.main() == 1
    assert capsys.readouterr().out.startswith("WRONG: device=npu is not available here")
