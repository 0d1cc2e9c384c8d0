"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the checkout (`../shared/data`), described by its MANIFEST.json; the test is skipped where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "MANIFEST.json").is_file():
        pytest.skip(f"the shared data is not here: no MANIFEST.json in {path}")
    return path
