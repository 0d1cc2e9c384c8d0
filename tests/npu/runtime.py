"""A child process with the real torch-npu wheel and no CANN.

The memory-only runtime stands for every CANN library the wheel links to. The wheel lies in a folder of its own, where
`make test-npu` puts it, or where MEGATRON_REPLAY_TORCH_NPU says. With it on the path a plain `import torch` fails on a
machine without CANN.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ASCEND = ROOT / "csrc" / "ascend"
VERSION = "2.13.0"
WHEEL = Path(os.environ.get("MEGATRON_REPLAY_TORCH_NPU", Path(sys.prefix) / f"torch-npu-{VERSION}"))
CANN = ("hccl", "ascendcl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")
"""The CANN libraries that the wheel's libraries are linked to (readelf -d)."""


@dataclass(frozen=True)
class Runtime:
    """The files that a child needs to find."""

    libraries: Path
    """The memory-only runtime under CANN's names."""

    def run(self, child: str, *words: str, path: Sequence[Path] = (), **variables: str) -> Any:
        """The last line that children/`child`.py prints, read as JSON; AssertionError with its output when it fails."""
        places = [*path, HERE, WHEEL, ROOT]
        env = {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.libraries),
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # torch would import torch_npu on its own, and hide why it cannot
            "TASK_QUEUE_ENABLE": "0",  # errors where the operator was called
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        command = [sys.executable, str(HERE / "children" / f"{child}.py"), *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, (
            f"{child} {words} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        )
        return json.loads(done.stdout.splitlines()[-1])


def make(folder: Path) -> Runtime:
    """Compile the memory-only runtime into a folder; skips where the wheel or a compiler is missing."""
    require_wheel()
    require_compiler()
    libraries = folder / "lib64"  # where CANN has its own
    libraries.mkdir()
    first, headers = libraries / f"lib{CANN[0]}.so", WHEEL / "torch_npu" / "include"
    flags = ["-shared", "-fPIC", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", str(headers)]
    build("c++", *flags, str(ASCEND / "sim" / "acl" / "memory_acl.cpp"), "-o", str(first))
    for name in CANN[1:]:
        (libraries / f"lib{name}.so").symlink_to(first)
    return Runtime(libraries)


def make_binding(runtime: Runtime, folder: Path) -> Path:
    """Build megatron_replay._npu in a folder as setup.py does, the kernels on the host stand-in.

    Returns the module's file.
    """
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    settings = {
        "REPLAY_STAND_IN": "ON",
        "REPLAY_TORCH": str(Path(torch.__file__).parent),
        "REPLAY_TORCH_NPU": str(WHEEL / "torch_npu"),
        "REPLAY_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "REPLAY_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "REPLAY_STANDARD": "20",
        "ASCEND_HOME_PATH": str(runtime.libraries.parent),
        "CMAKE_CXX_FLAGS": "-O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-missing-field-initializers",
    }
    build("cmake", "-S", str(ASCEND), "-B", str(folder), *(f"-D{name}={value}" for name, value in settings.items()))
    build("cmake", "--build", str(folder), "--target", "_npu")
    (module,) = folder.glob("_npu*.so")
    return module


def build(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def require_wheel() -> None:
    found = sorted(WHEEL.glob("torch_npu-*.dist-info"))
    if not found:
        pytest.skip(
            f"torch-npu {VERSION} is not in {WHEEL}; make test-npu installs it (a wheel for Linux and Python 3.9 to "
            "3.13)"
        )
    if found[0].name != f"torch_npu-{VERSION}.dist-info":
        pytest.skip(f"{found[0].name} lies in {WHEEL}, these tests are for torch-npu {VERSION}")
    if not torch.__version__.startswith(VERSION):
        pytest.skip(f"torch {torch.__version__} is here, torch-npu {VERSION} is for torch {VERSION}")


def require_compiler() -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
