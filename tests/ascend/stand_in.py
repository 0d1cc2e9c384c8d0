"""Builds the AscendC kernels for the host stand-in and calls them on torch tensors.

It also builds a kernel's broken variants, in one library.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "ascend"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}
TILINGS = {  # number of arguments, call
    "fwd": (3, "fwd_tiling(static_cast<Element>(a0), a1, a2)"),
    "dw": (4, "dw_tiling(static_cast<Element>(a0), static_cast<Element>(a1), a2, a3)"),
    "parts": (1, "restricted_bwd_dw_parts(a0)"),
    "topk": (1, "topk_capacity(a0)"),
}
TYPES = {"p": ("void*", ctypes.c_void_p), "u": ("uint32_t", ctypes.c_uint32), "U": ("uint64_t", ctypes.c_uint64)}
COUNTERS = (
    "s",
    "v",
    "mte2",
    "mte3",
    "s_bytes",
    "v_bytes",
    "mte2_bytes",
    "mte3_bytes",
    "repeats",
    "barriers",
    "scalar_waits",
    "buffer",
)


@dataclass(frozen=True)
class Signature:
    """The arguments of a launcher after stream and blocks.

    They are element types, then pointers (p), 32-bit (u) and 64-bit (U) numbers, scalars (S).
    """

    elements: int
    arguments: str

    def parameters(self) -> str:
        names = [f"uint32_t e{i}" for i in range(self.elements)]
        names += [f"{TYPES.get(kind, TYPES['p'])[0]} a{i}" for i, kind in enumerate(self.arguments)]
        return ", ".join(["uint32_t blocks", *names])

    def values(self) -> str:
        names = [f"static_cast<Element>(e{i})" for i in range(self.elements)]
        names += [
            f"*static_cast<const MoclipScalars*>(a{i})" if kind == "S" else f"a{i}"
            for i, kind in enumerate(self.arguments)
        ]
        return ", ".join(["blocks", *names])

    def argtypes(self) -> list[Any]:
        return [ctypes.c_uint32] * (1 + self.elements) + [TYPES.get(kind, TYPES["p"])[1] for kind in self.arguments]


SIGNATURES = {
    "restricted_fwd": Signature(1, "ppppppppppuuuu"),
    "restricted_bwd_dh": Signature(1, "ppppppuuuu"),
    "restricted_bwd_dw": Signature(2, "pppppppuuuuuu"),
    "logits_fwd": Signature(1, "pppppppuuuu"),
    "logits_bwd": Signature(1, "pppppppppuuu"),
    "moclip_stats": Signature(1, "pppU"),
    "moclip_update": Signature(2, "ppppppUS"),
    "topk": Signature(1, "pppppuuuu"),
}


class StandInError(Exception):
    """A rule of the stand-in that a kernel broke."""


class Library:
    """A compiled library.

    `call("restricted_fwd", ...)` runs a kernel and raises StandInError with the rule it broke.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def call(
        self,
        kernel: str,
        elements: Sequence[torch.dtype],
        *arguments: Any,
        blocks: int = 3,
        backwards: bool = False,
        variant: str = "call",
    ) -> dict[str, int]:
        """Run a kernel; the counters of the run."""
        function = getattr(self._library, f"{variant}_{kernel}")
        function.argtypes, function.restype = SIGNATURES[kernel].argtypes(), ctypes.c_char_p
        self._library.sim_backwards(int(backwards))
        for argument in arguments:
            assert not isinstance(argument, Tensor) or argument.is_contiguous()
        plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        error = function(blocks, *(ELEMENTS[e] for e in elements), *plain)
        if error:
            raise StandInError(error.decode())
        return self.counters()

    def counters(self, block: int = -1, kernel: int = 0) -> dict[str, int]:
        """Counters of the last call: of one block, or of all; restricted_bwd_dw is two kernels."""
        out = (ctypes.c_uint64 * len(COUNTERS))()
        self._library.sim_counters(kernel, block, out)
        return dict(zip(COUNTERS, out, strict=True))

    def tiling(self, name: str, *arguments: Any) -> tuple[int, ...]:
        """The fields of a tiling (op_host/tiling.h)."""
        out = (ctypes.c_uint32 * 8)()
        plain = [ELEMENTS[a] if isinstance(a, torch.dtype) else int(a) for a in arguments]
        count = getattr(self._library, f"tiling_{name}")(*plain, out)
        return tuple(out[:count])


def compile_(output: Path, *arguments: str | Path) -> Path:
    done = subprocess.run(
        ["g++", *FLAGS, f"-I{SOURCE}/sim", f"-I{SOURCE}/op_host", *map(str, arguments), "-o", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def build_core(folder: Path) -> list[Path]:
    """The parts every library shares: what is not a template of the stand-in, and the tiling."""
    files = [*sorted((SOURCE / "sim").glob("*.cpp")), SOURCE / "op_host" / "tiling.cpp"]
    return [compile_(folder / f"{file.stem}.o", "-c", file) for file in files if file.stem != "launch"]


def build(folder: Path, core: Sequence[Path]) -> Path:
    """The kernels as they are, behind their launchers."""
    text = ["#include <cstring>", '#include "tiling.h"', '#include "run.h"', "using namespace megatron_replay::ascend;"]
    for name, signature in SIGNATURES.items():
        launch = f"launch_{name}(nullptr, {signature.values()})"
        text.append(
            f'extern "C" const char* call_{name}({signature.parameters()}) {{ return ascend_sim::caught([&] {{ '
            f"{launch}; }}); }}"
        )
    for name, (arguments, call) in TILINGS.items():
        parameters = "".join(f"uint32_t a{i}, " for i in range(arguments))
        body = f"const auto tiling = {call}; std::memcpy(out, &tiling, sizeof tiling); return sizeof tiling / 4;"
        text.append(f'extern "C" int tiling_{name}({parameters}uint32_t* out) {{ {body} }}')
    (folder / "calls.cpp").write_text("\n".join(text) + "\n")
    objects = [
        compile_(folder / f"{file.stem}.o", "-c", file)
        for file in (SOURCE / "sim" / "launch.cpp", folder / "calls.cpp")
    ]
    return compile_(folder / "kernels.so", "-shared", *core, *objects)


@dataclass(frozen=True)
class Mutation:
    """A broken variant: `old` must occur exactly once in the file and becomes `new`.

    `says` is part of the error, or "wrong" result.
    """

    name: str
    file: str
    old: str
    new: str
    says: str


def flattened(file: str, changes: Sequence[Mutation] = (), seen: set[str] | None = None) -> str:
    """A header of op_kernel with the ones it includes, each once, changed."""
    seen = set() if seen is None else seen
    if file in seen:
        return ""
    seen.add(file)
    text = (SOURCE / "op_kernel" / file).read_text()
    for change in changes:
        if change.file == file:
            assert text.count(change.old) == 1, (
                f"{change.name}: {change.old!r} occurs {text.count(change.old)} times in {file}"
            )
            text = text.replace(change.old, change.new)
    text = text.replace("#pragma once", "").replace('#include "kernel_operator.h"', "")
    return re.sub(r'#include "([^"]+)"', lambda match: flattened(match[1], changes, seen), text)


TEMPLATES = {"restricted_bwd_dw": "bfloat16_t, float", "moclip_update": "float, bfloat16_t"}
"""The element types that a kernel's variants are built for; bfloat16 of a kernel that is not here."""
MERGE = (
    "run_restricted_bwd_dw_merge({0}restricted_bwd_dw_merge<float>, blocks, static_cast<Element>(e1), "
    "a1, a2, a5, a6, a8, a9, a10, a11, a12);"
)


def build_variants(folder: Path, core: Sequence[Path], kernel: str, mutations: Sequence[Mutation]) -> Path:
    """All broken variants of a kernel in one library: v0, v1, ..."""
    signature = SIGNATURES[kernel]
    text = ['#include "kernel_operator.h"', '#include "launchers.h"', "using namespace ascend_sim;"]
    for i, mutation in enumerate(mutations):
        text.append(f"namespace v{i} {{\n{flattened(f'{kernel}.h', [mutation])}\n}}")
        inside = f"v{i}::megatron_replay::ascend::"
        run = f"run_{kernel}({inside}{kernel}<{TEMPLATES.get(kernel, 'bfloat16_t')}>, {signature.values()});"
        if kernel == "restricted_bwd_dw":  # a launch is both kernels
            run += MERGE.format(inside)
        text.append(
            f'extern "C" const char* v{i}_{kernel}({signature.parameters()}) {{ return caught([&] {{ {run} }}); }}'
        )
    source = folder / f"{kernel}_variants.cpp"
    source.write_text("\n".join(text) + "\n")
    return compile_(folder / f"{kernel}_variants.so", "-w", "-shared", source, *core)
