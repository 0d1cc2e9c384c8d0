"""One build of the kernels for the host stand-in a session; skipped where there is no C++ compiler."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stand_in import Library, build, build_core


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("the host stand-in needs g++")
    return tmp_path_factory.mktemp("ascend")


@pytest.fixture(scope="session")
def stand_in_core(build_folder: Path) -> list[Path]:
    return build_core(build_folder)


@pytest.fixture(scope="session")
def kernels(build_folder: Path, stand_in_core: list[Path]) -> Library:
    return Library(build(build_folder, stand_in_core))
