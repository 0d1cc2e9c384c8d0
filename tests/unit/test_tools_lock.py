"""requirements.lock holds what pyproject.toml asks for, in versions it allows."""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def lock() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "tools" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_requirement_is_pinned_to_an_allowed_version(lock: types.ModuleType, pins: dict[str, str]) -> None:
    for need in lock.wanted(ROOT / "pyproject.toml"):
        version = pins.get(canonicalize_name(need.name))
        assert version is not None, f"{need.name} is not in requirements.lock; run tools/lock.py"
        assert need.specifier.contains(version), (
            f"requirements.lock has {need.name} {version}, pyproject.toml asks for {need}"
        )


def test_pins_are_names_and_public_versions_only(pins: dict[str, str]) -> None:
    assert pins["torch"] == "2.13.0"
    assert all(version.replace(".", "").isalnum() for version in pins.values()), pins
    assert not {"torch-npu", "triton", "llama-cpp-python", "wandb"} & set(pins)


@pytest.mark.parametrize("extra", ["hf", "demo", "eval", "npu"])
def test_an_extra_holds_what_the_code_imports(lock: types.ModuleType, extra: str) -> None:
    extras = lock.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    assert set(extras) == {"hf", "demo", "eval", "npu", "dev"}, "a new one belongs in the list above"
    folders = ("megatron_replay", "benchmarks", "tests")
    code = "\n".join(path.read_text(encoding="utf-8") for name in folders for path in (ROOT / name).rglob("*.py"))
    for need in map(Requirement, extras[extra]):
        module = need.name.replace("-", "_")
        assert re.search(rf"^\s*(?:import|from) {module}\b|import_module\(\"{module}", code, re.MULTILINE), need


def test_resolve_follows_what_packages_need(lock: types.ModuleType) -> None:
    found = lock.resolve([Requirement("jinja2")])
    assert set(found) == {"jinja2", "markupsafe"}
    assert "+" not in lock.resolve([Requirement("torch")])["torch"]


def test_resolve_names_what_is_missing_or_too_old(lock: types.ModuleType) -> None:
    with pytest.raises(LookupError, match="no-such-package is not installed"):
        lock.resolve([Requirement("no-such-package")])
    with pytest.raises(LookupError, match=r"jinja2 .* is installed, but jinja2>=99 is needed"):
        lock.resolve([Requirement("jinja2>=99")])
