"""Write requirements.lock: the versions here of all that pyproject.toml asks for, directly or through others.

    python tools/lock.py > requirements.lock

Packages that happen to be installed and are not needed stay out. The tool needs Python 3.11 (tomllib), as the lock
itself does.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("hf", "demo", "dev")
HEADER = "# Python 3.11. Written by `python tools/lock.py`; what pyproject.toml needs with its extras {}.\n"


def wanted(pyproject: Path) -> list[Requirement]:
    """The requirements that build the project, those it runs on, and the extras of development."""
    tree = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = tree["project"]
    extras = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    return [Requirement(text) for text in [*tree["build-system"]["requires"], *project["dependencies"], *extras]]


def resolve(roots: list[Requirement]) -> dict[str, str]:
    """Name -> installed version of the roots and of everything they need here.

    Raises LookupError for one that is missing or too old.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = list(roots)
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if (name, frozenset(need.extras)) in seen:
            continue
        seen.add((name, frozenset(need.extras)))
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise LookupError(
                f"{name} is not installed in {sys.prefix}; install the project with its extras first"
            ) from None
        if not need.specifier.contains(package.version, prereleases=True):
            raise LookupError(f"{name} {package.version} is installed, but {need} is needed")
        versions[name] = Version(package.version).public  # +cpu and the like name a build, not a version
        todo += [inner for inner in map(Requirement, package.requires or []) if applies(inner, need.extras)]
    return versions


def applies(need: Requirement, extras: set[str]) -> bool:
    """True where a requirement counts on this machine for these extras of the package that states it."""
    return need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras or {""})


def main() -> int:
    try:
        versions = resolve(wanted(ROOT / "pyproject.toml"))
    except LookupError as err:
        print(f"lock: {err}", file=sys.stderr)
        return 2
    print(HEADER.format(", ".join(EXTRAS)) + "\n".join(f"{name}=={versions[name]}" for name in sorted(versions)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
