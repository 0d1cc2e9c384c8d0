"""Triton's kernels without a GPU.

Tested are their results under its interpreter, that they compile for a GPU, and what happens where Triton is missing.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_replay.kernels import library, on_cuda, torch_twins
from megatron_replay.kernels.schemas import OPERATORS

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, **variables: str) -> str:
    """The output of a Python process of its own; it must succeed."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # 3.9 warns that its default for fused multiply-add will change; and with one thread the children of two workers fit
    # two cores
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "TRITON_DEFAULT_FP_FUSION": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
def test_the_kernels_are_the_references_under_the_interpreter() -> None:
    said = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE.parent / "triton_interpreted.py"), TRITON_INTERPRET="1"
    )
    assert " passed" in said and "skipped" not in said


@needs_triton
@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Triton's interpreter does not check types as its compiler does; that needs no GPU."""
    said = run(str(HERE.parent / "triton_compiled.py"), TRITON_CACHE_DIR=str(tmp_path))
    assert said.count("machine code") == 28


def test_importing_the_operators_leaves_triton_alone() -> None:
    run(
        "-c",
        "import sys, megatron_replay.kernels.library as o; o.live(); o.choose('auto'); assert "
        "'megatron_replay.kernels.triton_launch' not in sys.modules",
    )


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Forget what is known of Triton, so that these tests let it be looked up again; a process looks once."""
    for known in (on_cuda.triton, on_cuda._source):
        known.cache_clear()
    yield
    for known in (on_cuda.triton, on_cuda._source):
        known.cache_clear()


def test_without_triton_plain_torch_answers_and_says_so_once(
    asked_anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(on_cuda.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    hidden, weight = torch.randn(2, 4), torch.randn(6, 4)
    args = (
        hidden,
        weight,
        torch.tensor([0, 2, 3]),
        torch.tensor([1, 5, 2], dtype=torch.int32),
        torch.tensor([1, -1]),
        True,
    )
    with caplog.at_level(logging.WARNING):
        found = [on_cuda.call("restricted_fwd", *args) for _ in range(2)]
    assert all(map(torch.equal, found[1], torch_twins.restricted_fwd(*args)))
    assert [r.message for r in caplog.records] == [
        "triton not installed: the restricted loss runs in plain torch on cuda"
    ]
    assert set(library.live("cuda").values()) == {"reference"}


def test_a_triton_that_cannot_be_loaded_is_named(asked_anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(on_cuda.importlib.util, "find_spec", lambda name: object())  # type: ignore[attr-defined]
    monkeypatch.setattr(on_cuda.importlib, "import_module", broken)
    assert on_cuda.triton() == "cannot be loaded: libtriton.so: undefined symbol"


def test_the_operators_are_registered_for_cuda() -> None:
    for name, operator in OPERATORS.items():
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_replay::{name}", "CUDA")
        assert registered is (operator.triton)
    assert set(library.live("cuda", "reference").values()) == {"reference"}


@needs_triton
def test_live_says_triton() -> None:
    run(
        "-c",
        "from megatron_replay.kernels import library, schemas; found = library.live('cuda'); "
        "assert found == {n: 'triton' if o.triton else 'reference' for n, o in schemas.OPERATORS.items()}, found",
    )
