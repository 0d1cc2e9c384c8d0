"""Compile every Triton kernel to machine code for two generations of GPUs, without a GPU.

`test_kernels_triton.py` runs it by itself.
"""

from __future__ import annotations

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_for

from megatron_replay.kernels import triton_launch, triton_programs

KERNELS = (
    "flaws",
    "flaws_by_column",
    "restricted_bwd",
    "restricted_bwd_dh",
    "restricted_bwd_further",
    "restricted_fwd",
    "restricted_fwd_further",
    "restricted_logits_bwd",
    "restricted_logits_fwd",
)
TARGETS = {80: ("bf16", torch.float32), 90: ("fp64", torch.float64)}
"""Compute capability -> dtype of the matrices, and that of sums."""
WIDTH = 1000
POINTERS = {
    "i64": ("offsets", "gold"),
    "i32": ("columns", "touched", "begins", "tokens", "found"),
    "matrix": ("hidden", "weight", "out", "logits", "grad_logits"),
    "sum": (
        *("z", "stats", "mixtures", "mixture", "scratch_stats", "scratch", "scale", "coefficient", "scalars"),
        *("targets", "target_mixtures", "target_scratch", "target_mixture"),
    ),
}
ABSENT = ("targets", "target_mixture")
"""Arguments that may be None; a kernel that has one is compiled with and without."""


def signature(name: str, matrix: str, total: str) -> str:
    """Triton's type of an argument, by its name."""
    if name.isupper():
        return "constexpr"
    kinds = [kind for kind, names in POINTERS.items() if name in names]
    return "*" + {"matrix": matrix, "sum": total}.get(kinds[0], kinds[0]) if kinds else "i32"


for capability, (matrix, kind) in TARGETS.items():
    tile = triton_launch._tile(WIDTH, kind)
    warps = tile.pop("num_warps")
    values = {**tile, "MIX": True, "ADD": True, "ACC": triton_launch._SUM[kind], "SPLIT": triton_launch.SPLIT}
    values["BLOCK"] = triton_launch.BLOCK
    for name in KERNELS:
        kernel = getattr(triton_programs, name)
        total = {torch.float32: "fp32", torch.float64: "fp64"}[kind]
        for absent in ((), ABSENT) if set(ABSENT) & set(kernel.arg_names) else ((),):
            given = {**values, **dict.fromkeys(absent)}
            source = ASTSource(
                kernel,
                {arg: "constexpr" if arg in absent else signature(arg, matrix, total) for arg in kernel.arg_names},
                {(at,): given[arg] for at, arg in enumerate(kernel.arg_names) if arg in given},
            )
            built = compile_for(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
            print(f"sm_{capability} {name}: {len(built.asm['cubin'])} bytes of machine code")
