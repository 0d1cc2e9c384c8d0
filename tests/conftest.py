"""Fixtures that every test may use."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # for optimizer_cases

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what follows the first n cases of a test that has `@pytest.mark.matrix(n)`."""
    seen: Counter[str] = Counter()
    for item in items:
        if matrix := item.get_closest_marker("matrix"):
            test = item.nodeid.partition("[")[0]
            seen[test] += 1
            if seen[test] > matrix.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the checkout (`../shared/data`), described by its MANIFEST.json.

    The test is skipped where it is absent.
    """
    if not (SHARED / "MANIFEST.json").is_file():
        pytest.skip(f"the shared data is not here: no MANIFEST.json in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def shared_file(shared_data: Path) -> Callable[[str], Path]:
    """`shared_file("text/wikitext2_valid.txt")`: that file as MANIFEST.json lists it.

    The test is skipped where the file is missing or another one.
    """
    listed = {
        entry["file"]: entry["sha256"]
        for entry in json.loads((shared_data / "MANIFEST.json").read_text(encoding="utf-8"))
    }

    @cache
    def find(name: str) -> Path:
        path = shared_data / name
        if not path.is_file():
            pytest.skip(f"shared data: {name} is not here")
        if hashlib.sha256(path.read_bytes()).hexdigest() != listed.get(name):
            pytest.skip(f"shared data: {name} is not the file that MANIFEST.json lists (sha256 differs); restore it")
        return path

    return find
