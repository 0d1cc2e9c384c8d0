"""setup.py in a project of one small source: compiled where a compiler is there, installed as pure Python where none
is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

KERNELS = """
#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)
extern "C" __attribute__((visibility("default"))) PyObject* INIT(TORCH_EXTENSION_NAME)() {
  return PyModule_Create(&module);
}
"""
BROKEN = "this is no C++\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "trial"\nversion = "0"\n[tool.setuptools]\npackages = ["megatron_replay"]\n'
    )
    (tmp_path / "megatron_replay").mkdir()
    (tmp_path / "megatron_replay" / "__init__.py").touch()
    return tmp_path


def add(project: Path, name: str, text: str) -> None:
    path = project / "csrc" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def build(project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=project, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def compiled(project: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in (project / "megatron_replay").rglob("*.so"))


def test_a_wheel_holds_every_file_of_the_package_that_is_not_python() -> None:
    tomllib = pytest.importorskip("tomllib")
    package, built = ROOT / "megatron_replay", {".py", ".pyc", ".so"}
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "megatron_replay"
    ]
    assert {path for pattern in patterns for path in package.glob(pattern)} == {
        path for path in package.rglob("*") if path.is_file() and path.suffix not in built
    }


def test_nothing_in_csrc_is_nothing_to_build(project: Path) -> None:
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert compiled(project) == []


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@needs_compiler
@pytest.mark.slow
def test_the_kernels_are_compiled_against_torch_and_named_for_it(project: Path) -> None:
    add(project, "register.cpp", KERNELS)
    add(project, "cpu/rule.cpp", "#include <c10/macros/Macros.h>\nint rule() { return 1; }\n")
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert compiled(project) == ["_C"]
    assert "-march=native" not in done.stdout, "a wheel must run on another machine than the one that built it"
    call = "import torch; from megatron_replay import _C; print(_C.__name__)"
    subprocess.run([sys.executable, "-c", call], cwd=project, capture_output=True, text=True, check=True)


def test_a_missing_compiler_leaves_a_warning_and_the_python_package(project: Path) -> None:
    add(project, "register.cpp", KERNELS)
    done = build(project, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "_C" in done.stdout + done.stderr and "no-such-compiler" in done.stdout + done.stderr
    assert compiled(project) == []


@needs_compiler
def test_a_source_that_does_not_compile_leaves_a_warning_and_the_python_package(project: Path) -> None:
    add(project, "register.cpp", KERNELS)
    add(project, "cpu/rule.cpp", BROKEN)
    done = build(project)
    assert done.returncode == 0, done.stderr
    assert "_C" in done.stdout + done.stderr and "rule.cpp" in done.stdout + done.stderr
    assert compiled(project) == []


@needs_compiler
def test_flags_from_the_environment_come_after_ours(project: Path) -> None:
    add(project, "register.cpp", BROKEN)
    commands = build(project, MEGATRON_REPLAY_CXXFLAGS="-O1 -g1").stdout.splitlines()
    (kernels,) = (line for line in commands if "register.cpp" in line and " -c " in line)
    assert kernels.index(" -O3") < kernels.index(" -O1 -g1")


CMAKE = """
cmake_minimum_required(VERSION 3.18)
project(trial C)
file(WRITE ${CMAKE_BINARY_DIR}/npu.c "const char* soc(void) { return \\"${SOC_VERSION} ${REPLAY_STANDARD}\\"; }")
add_library(_npu MODULE ${CMAKE_BINARY_DIR}/npu.c)
set_target_properties(_npu PROPERTIES PREFIX "")
"""
"""A stand-in for csrc/ascend/CMakeLists.txt, which needs CANN's compiler."""


def test_the_npu_build_without_cann_says_what_is_missing(project: Path) -> None:
    add(project, "ascend/CMakeLists.txt", CMAKE)
    done = build(project, MEGATRON_REPLAY_BUILD="npu", ASCEND_HOME_PATH="")
    assert done.returncode != 0
    assert "ASCEND_HOME_PATH is not set; source CANN's set_env.sh" in done.stderr and "Traceback" not in done.stderr
    wrong = build(project, MEGATRON_REPLAY_BUILD="npu", ASCEND_HOME_PATH="/no/such/cann")
    assert wrong.returncode != 0 and "ASCEND_HOME_PATH is '/no/such/cann', which is no folder" in wrong.stderr


def test_a_device_that_is_none(project: Path) -> None:
    done = build(project, MEGATRON_REPLAY_BUILD="gpu")
    assert done.returncode != 0 and "MEGATRON_REPLAY_BUILD='gpu' is not a device; choose cpu, npu, cuda" in done.stderr


@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake here")
def test_the_npu_build_goes_through_cmake(project: Path, tmp_path: Path) -> None:
    add(project, "ascend/CMakeLists.txt", CMAKE)
    done = build(project, MEGATRON_REPLAY_BUILD="npu", ASCEND_HOME_PATH=str(tmp_path), SOC_VERSION="Ascend910B1")
    assert done.returncode == 0, done.stderr
    assert compiled(project) == ["_npu"]
    (module,) = (project / "megatron_replay").glob("_npu*.so")
    call = f"import ctypes; f = ctypes.CDLL({str(module)!r}).soc; f.restype = ctypes.c_char_p; print(f().decode())"
    answer = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() in ("Ascend910B1 17", "Ascend910B1 20")


@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake here")
def test_an_npu_build_that_fails_fails(project: Path, tmp_path: Path) -> None:
    add(project, "ascend/CMakeLists.txt", 'message(FATAL_ERROR "no AscendC compiler")\n')
    done = build(project, MEGATRON_REPLAY_BUILD="npu", ASCEND_HOME_PATH=str(tmp_path))
    assert done.returncode != 0 and "the NPU's kernels do not build" in done.stderr


@pytest.mark.parametrize(
    ("torch", "triton", "says"),
    [
        ("version.cuda = '13.0'", "", ""),
        ("version.cuda = None", "", "needs a torch with CUDA, torch 2.13.0 has none; install one"),
        (
            "version.cuda = '13.0'",
            "raise ImportError('no libtriton')",
            "needs triton, which cannot be imported (no libtriton); pip install",
        ),
        (
            "raise ImportError('no libcudart')",
            "",
            "needs torch, which cannot be imported (no libcudart); install it first",
        ),
    ],
)
def test_for_cuda_it_only_looks_for_what_will_compile_the_kernels(
    project: Path, tmp_path: Path, torch: str, triton: str, says: str
) -> None:
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / "torch.py").write_text(
        f"import types\n__version__, version = '2.13.0', types.SimpleNamespace()\n{torch}\n"
    )
    (fakes / "triton.py").write_text(triton)
    done = build(project, MEGATRON_REPLAY_BUILD="cuda", PYTHONPATH=str(fakes))
    assert compiled(project) == []
    if says:
        assert (
            done.returncode != 0
            and f"MEGATRON_REPLAY_BUILD=cuda {says}" in done.stderr
            and "Traceback" not in done.stderr
        )
        assert "or leave MEGATRON_REPLAY_BUILD out to build for the CPU" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
