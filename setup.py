"""Compiles the C++ kernels of csrc/; everything else about the project stands in pyproject.toml.

MEGATRON_REPLAY_BUILD names a device to build for, besides the CPU: `cpu` (the default: no other), `npu` or `cuda`.
The CPU's kernels are compiled if there is a C++ compiler; without one the package installs all the same and runs in
plain torch. The NPU's kernels were asked for: without CANN (ASCEND_HOME_PATH), or when they do not compile, the build
fails. CUDA's kernels are Triton's, compiled when they first run: the build fails only where torch has no CUDA or Triton
is missing.

MEGATRON_REPLAY_CXXFLAGS holds further flags for the CPU's kernels. They come after ours, so they override them; with
them `make sanitize` says which sanitizers to use.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEVICES = ("cpu", "npu", "cuda")


def sources(*patterns: str) -> list[str]:
    """The files in csrc/ of these patterns, relative to the project as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def cpu_kernels(files: list[str]) -> Extension:
    """The extension `_C`. It needs the torch that will load it, so `pip install --no-build-isolation` builds it."""
    import torch
    from torch.utils.cpp_extension import CppExtension

    flags = [
        "-O3",
        "-fvisibility=hidden",
        f"-std=c++{cxx_standard(torch)}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    # Every instruction set, tail and thread must give the same bits, so no fused multiply-add where a compiler sees
    # fit. The other two let square roots and selections be vectorised, and change no bits.
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "linux":
        # not at the link: torch brings the OpenMP runtime, and a second one would not obey torch.set_num_threads
        flags.append("-fopenmp")
    flags += ["-DTORCH_EXTENSION_NAME=_C", *os.environ.get("MEGATRON_REPLAY_CXXFLAGS", "").split()]
    return CppExtension("megatron_replay._C", files, extra_compile_args=flags, depends=sources("*.h", "cpu/*.h"))


def npu_kernels() -> Extension:
    """Built by csrc/ascend/CMakeLists.txt with the AscendC compiler; `soc` is the device they are for."""
    home = os.environ.get("ASCEND_HOME_PATH")
    if not home or not Path(home).is_dir():
        where = f"is {home!r}, which is no folder" if home else "is not set"
        sys.exit(
            f"error: MEGATRON_REPLAY_BUILD=npu needs CANN, but ASCEND_HOME_PATH {where}; source CANN's set_env.sh (it "
            "sets the variable) "
            "in the shell that builds, or leave MEGATRON_REPLAY_BUILD out to build for the CPU"
        )
    if shutil.which("cmake") is None:
        sys.exit("error: MEGATRON_REPLAY_BUILD=npu needs cmake, which is not here; pip install cmake")
    return Extension(
        "megatron_replay._npu", ["csrc/ascend/CMakeLists.txt"], depends=sources("ascend/**/*.h", "ascend/**/*.cpp")
    )


def check_cuda() -> None:
    """End the build, with the reason, unless this environment has what CUDA's kernels need when they run."""
    way_out = "(with pip's --no-build-isolation), or leave MEGATRON_REPLAY_BUILD out to build for the CPU"
    try:
        import torch
    except ImportError as err:
        sys.exit(
            f"error: MEGATRON_REPLAY_BUILD=cuda needs torch, which cannot be imported ({err}); install it first "
            f"{way_out}"
        )
    if torch.version.cuda is None:
        sys.exit(
            f"error: MEGATRON_REPLAY_BUILD=cuda needs a torch with CUDA, torch {torch.__version__} has none; install "
            f"one {way_out}"
        )
    try:
        import triton  # noqa: F401
    except ImportError as err:
        sys.exit(
            f"error: MEGATRON_REPLAY_BUILD=cuda needs triton, which cannot be imported ({err}); pip install triton "
            f"{way_out}"
        )


def python_settings() -> dict[str, str]:
    """The variables of csrc/ascend/binding.cmake, about the Python that will load the module.

    torch-npu is found without importing it.
    """
    import torch

    npu = importlib.util.find_spec("torch_npu")
    return {
        "REPLAY_TORCH": str(Path(torch.__file__).parent),
        "REPLAY_TORCH_NPU": str(Path(npu.origin).parent) if npu and npu.origin else "",
        "REPLAY_PYTHON_INCLUDE": sysconfig.get_path("include"),
        "REPLAY_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
        "REPLAY_STANDARD": cxx_standard(torch),
    }


def cxx_standard(torch: ModuleType) -> str:
    """The C++ that torch's headers are written in."""
    return "20" if torch.torch_version.TorchVersion(torch.__version__) >= "2.10" else "17"


class Build(build_ext):
    """Hands the NPU's extension to CMake and takes the module it makes."""

    def build_extension(self, ext: Extension) -> None:
        if not ext.sources[0].endswith("CMakeLists.txt"):
            super().build_extension(ext)
            return
        folder, target = (Path(self.build_temp) / "ascend").absolute(), Path(self.get_ext_fullpath(ext.name)).absolute()
        configure = ["cmake", "-S", str(ROOT / "csrc" / "ascend"), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [
            f"-DSOC_VERSION={os.environ.get('SOC_VERSION', 'Ascend910B3')}",
            f"-DASCEND_HOME_PATH={os.environ['ASCEND_HOME_PATH']}",
        ]
        configure += [f"-D{name}={value}" for name, value in python_settings().items()]
        for command in (
            configure,
            ["cmake", "--build", str(folder), "--target", "_npu", "--parallel", str(os.cpu_count() or 1)],
        ):
            if subprocess.run(command).returncode:
                sys.exit(f"error: the NPU's kernels do not build: {' '.join(command)}")
        (built,) = folder.rglob("_npu*.so")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(built, target)


def optional_kernels() -> list[Extension]:
    """The CPU's; none, and a warning, where torch is missing."""
    files = sources("register.cpp", "cpu/*.cpp")
    if not files:
        return []
    try:
        extension = cpu_kernels(files)
    except ImportError as err:
        print(f"warning: {', '.join(files)} not compiled: {err}", file=sys.stderr)
        return []
    extension.optional = True  # a compiler that is missing or fails leaves a warning and the Python twins
    return [extension]


def extensions() -> list[Extension]:
    device = os.environ.get("MEGATRON_REPLAY_BUILD", "cpu")
    if device not in DEVICES:
        sys.exit(f"error: MEGATRON_REPLAY_BUILD={device!r} is not a device; choose {', '.join(DEVICES)}")
    if device == "cuda":
        check_cuda()
    return [*optional_kernels(), *([npu_kernels()] if device == "npu" else [])]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
