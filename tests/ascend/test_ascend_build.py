"""Checks of the device's build that need no CANN.

Its launchers are well typed, and the kernels include nothing but AscendC.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from stand_in import SOURCE, compile_


def test_the_devices_launchers_are_well_typed(build_folder: Path) -> None:
    text = (SOURCE / "op_kernel" / "launch_npu.cpp").read_text()
    # a launch is a call with three arguments more
    plain, launches = re.subn(r"<<<blocks, nullptr, stream>>>\(", "(", text)
    assert launches == 2
    plain = plain.replace('#include "entry.cpp"', f'#include "{SOURCE}/op_kernel/entry.cpp"').replace(
        '"../op_host/', f'"{SOURCE}/op_host/'
    )
    source = build_folder / "launch_npu.cpp"
    source.write_text("#include <cstdint>\n" + plain)
    compile_(build_folder / "launch_npu.o", "-Wno-unused-parameter", "-O0", "-c", source)


@pytest.mark.parametrize("file", ["op_kernel/launch_npu.cpp", "sim/launch.cpp"])
def test_every_launcher_is_there(file: str) -> None:
    declared = re.findall(r"void (launch_\w+)\((.*?)\);", (SOURCE / "op_host" / "launch.h").read_text(), re.S)
    defined = dict(re.findall(r"void (launch_\w+)\((.*?)\) \{", (SOURCE / file).read_text(), re.S))

    def types(parameters: str) -> list[str]:
        return [
            re.sub(r"[\s*]?\b\w+$|^void\*$", "", p.strip()).strip() if p.strip() != "void*" else "void*"
            for p in parameters.split(",")
        ]

    assert len(declared) == 8 and {name for name, _ in declared} == set(defined)
    for name, parameters in declared:
        assert types(parameters)[1:] == types(defined[name])[1:], name


def test_kernels_include_ascendc_only() -> None:
    for header in (SOURCE / "op_kernel").glob("*.h"):
        foreign = set(re.findall(r"#include [<\"]([^>\"]+)", header.read_text())) - {
            f.name for f in header.parent.glob("*.h")
        }
        assert foreign <= {"kernel_operator.h"}, f"{header.name} includes {foreign}"
