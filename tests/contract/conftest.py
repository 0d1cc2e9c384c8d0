"""The command line, and a tiny model to run it on."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bench import Bench
from served import Served
from tinymodel import QWEN3, SETTINGS, Tiny, write_lines, write_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The command line."""
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, served: Served) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    model = write_model(folder / "model", QWEN3)
    records = [{"prompt": f"count from {i}", "completion": " ".join(map(str, range(i, i + 6)))} for i in range(12)]
    found = Tiny(model, write_lines(folder / "data.jsonl", records), folder / "store")
    done = served(
        "collect", f"model={model}", f"data.path={found.data}", f"collect.store={found.store}", *SETTINGS, cwd=folder
    )
    assert done.code == 0, done.err
    return found


@pytest.fixture
def bench(tmp_path: Path, served: Served, tiny: Tiny) -> Bench:
    return Bench(tmp_path, served, tiny)
