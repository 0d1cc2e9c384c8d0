"""Compiles what lies in csrc/ where a C++ compiler is there; where none is, the package installs all the same and runs the Python twins.

Everything else about the project stands in pyproject.toml.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent


def sources(*patterns: str) -> list[str]:
    """The files in csrc/ of these patterns, relative to the project as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def store_codec(files: list[str]) -> Extension:
    from pybind11.setup_helpers import Pybind11Extension

    headers = sources("store/*.h")
    return Pybind11Extension("megatron_replay.store._codec", files, cxx_std=17, extra_compile_args=["-O3"], depends=headers)


def cpu_kernels(files: list[str]) -> Extension:
    """Needs the torch that will load them, so they are built with `pip install --no-build-isolation` only."""
    import torch
    from torch.utils.cpp_extension import CppExtension

    standard = "-std=c++20" if torch.torch_version.TorchVersion(torch.__version__) >= "2.10" else "-std=c++17"
    flags = ["-O3", "-fvisibility=hidden", standard, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    # Every instruction set, tail and thread must give the same bits, so no fused multiply-add where a compiler sees fit. The other two let
    # square roots and selections be vectorised, and change no bits.
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    if sys.platform == "linux":
        flags.append("-fopenmp")  # not at the link: torch brings the OpenMP runtime, and a second one would not obey torch.set_num_threads
    headers = sources("*.h", "cpu/*.h")
    return CppExtension("megatron_replay._C", files, extra_compile_args=[*flags, "-DTORCH_EXTENSION_NAME=_C"], depends=headers)


def extensions() -> list[Extension]:
    found = []
    for make, files in ((store_codec, sources("store/*.cpp")), (cpu_kernels, sources("register.cpp", "cpu/*.cpp"))):
        if not files:
            continue
        try:
            extension = make(files)
        except ImportError as err:
            print(f"warning: {', '.join(files)} not compiled: {err}", file=sys.stderr)
            continue
        extension.optional = True  # a compiler that is missing or fails leaves a warning and the Python twin
        found.append(extension)
    return found


setup(ext_modules=extensions())
