"""The rules of who may import whom, and of what may happen at import.

They are read from the source, so that nothing has to be imported to know it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_replay"

LAYERS = [
    {"errors", "config", "config_file", "environment", "registry", "cluster", "ablation", "ragged", "candidates"},
    {"kernels"},
    {"ops", "optim", "models", "data", "store", "scoring"},
    {"formats"},
    {"device"},
    {"parallel"},
    {"runtime"},
    {"demo", "doctor"},
    {"stages"},
    {"cli", "cli_args", "__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ISLANDS = LAYERS[2]
ROOMS = ("shims", "ranks", "mcore", "", "checkpoints")
"""The rooms of `parallel`, lowest first; "": the modules of the package itself."""
WITHOUT_TORCH = LAYERS[0] | {"data", "store", "scoring"} | LAYERS[-1]
DEVICE_WORDS = ("torch.cuda", "torch_npu", "torch.npu", "torch.ops.npu", "nccl", "hccl")
NAMES_DEVICES = {"device.py", *(f"parallel/shims/{name}.py" for name in ("adapters", "entries", "patches"))}
READS_ENVIRONMENT = {"device.py", "parallel/ranks/world.py"}

Offence = str


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def files(root: Path) -> list[Path]:
    return sorted((root / PACKAGE).rglob("*.py"))


def inside(root: Path, path: Path) -> str:
    """The path within the package, as in `parallel/ranks/world.py`."""
    return path.relative_to(root / PACKAGE).as_posix()


def part(inner: str) -> str:
    """The layer name a file belongs to: `parallel` of parallel/ranks/world.py, `cli` of cli.py."""
    return inner.split("/")[0].removesuffix(".py")


def imported(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, relative imports resolved, function bodies included."""
    home = [PACKAGE, *path.relative_to(root / PACKAGE).parts[:-1]]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def import_offences(root: Path) -> Iterator[Offence]:
    for path in files(root):
        inner = inside(root, path)
        me = part(inner)
        if me not in RANK:
            yield f"{inner}: {me!r} stands in no layer"
            continue
        for line, name in imported(root, path):
            top, *rest = name.split(".")
            if top == "megatron" and me != "parallel":
                yield f"{inner}:{line}: megatron is imported in parallel/ only"
            if top == "torch" and me in WITHOUT_TORCH:
                yield f"{inner}:{line}: {me} does without torch"
            other = rest[0] if top == PACKAGE and rest else me
            if RANK.get(other, 0) > RANK[me] or ({me, other} <= ISLANDS and me != other):
                yield f"{inner}:{line}: {me} may not import {name}"


def room(parts: list[str]) -> int:
    """The index in ROOMS of a module of `parallel`, by its path or dotted name below that."""
    return ROOMS.index(parts[0] if parts and parts[0] in ROOMS else "")


def room_offences(root: Path) -> Iterator[Offence]:
    """A room of `parallel` knows itself and the rooms below it."""
    for path in files(root):
        inner = inside(root, path)
        if part(inner) != "parallel":
            continue
        here = room(inner.split("/")[1:-1])
        for line, name in imported(root, path):
            top, *rest = name.split(".")
            if top == PACKAGE and rest[0] == "parallel" and room(rest[1:]) > here:
                yield f"{inner}:{line}: {ROOMS[here] or 'parallel'} may not import {name}"


def relative_offences(root: Path) -> Iterator[Offence]:
    """One way to name a module: from the package's root."""
    for path in files(root):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{inside(root, path)}:{node.lineno}: a relative import"


def word_offences(root: Path) -> Iterator[Offence]:
    for path in files(root):
        inner = inside(root, path)
        if inner in NAMES_DEVICES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield from (f"{inner}:{number}: says {word!r}" for word in DEVICE_WORDS if word in line)


def state_offences(root: Path) -> Iterator[Offence]:
    """`global` anywhere, and the environment outside its two files."""
    for path in files(root):
        inner = inside(root, path)
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Global):
                yield f"{inner}:{node.lineno}: a global statement"
            if inner in READS_ENVIRONMENT:
                continue
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if named and node.attr in ("environ", "getenv", "putenv"):  # type: ignore[attr-defined]
                yield f"{inner}:{node.lineno}: reads the environment"
        if inner not in READS_ENVIRONMENT:
            yield from (
                f"{inner}:{line}: reads the environment"
                for line, name in imported(root, path)
                if name in ("os.environ", "os.getenv")
            )


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported; a function's body does not."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            yield from at_import(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)


def root_name(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def import_time_offences(root: Path) -> Iterator[Offence]:
    """Assigning into an imported module, or a bare call, while being imported.

    The one bare call there is room for is `LIBRARY.define(...)` and its like in kernels/: torch has to know an operator
    before it is called.
    """
    for path in files(root):
        inner = inside(root, path)
        foreign = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(parsed(path))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        for node in at_import(parsed(path).body):
            targets = (
                node.targets
                if isinstance(node, (ast.Assign, ast.Delete))
                else [node.target]
                if isinstance(node, ast.AugAssign)
                else []
            )
            if any(
                isinstance(target, (ast.Attribute, ast.Subscript)) and root_name(target) in foreign
                for target in targets
            ):
                yield f"{inner}:{node.lineno}: changes another module at import"
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                operator = (
                    part(inner) == "kernels"
                    and isinstance(node.value.func, ast.Attribute)
                    and root_name(node.value.func) not in foreign
                )
                if not operator:
                    yield f"{inner}:{node.lineno}: {ast.unparse(node.value.func)}() is work at import"


RULES = [import_offences, room_offences, relative_offences, word_offences, state_offences, import_time_offences]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_to_the_layers(rule: object) -> None:
    offences = list(rule(ROOT))  # type: ignore[operator]
    assert not offences, "\n" + "\n".join(offences)


def test_only_files_that_name_devices_may() -> None:
    named = {
        inner for inner in NAMES_DEVICES if any(word in (ROOT / PACKAGE / inner).read_text() for word in DEVICE_WORDS)
    }
    assert named == NAMES_DEVICES


@pytest.mark.parametrize(
    ("rule", "inner", "text", "says"),
    [
        (import_offences, "ops/a.py", "from megatron_replay.optim import AdamW", "ops may not import"),
        (import_offences, "kernels/a.py", "from megatron_replay.ops import VocabShard", "kernels may not import"),
        (import_offences, "ops/a.py", "from ..store import x", "ops may not import megatron_replay.store.x"),
        (import_offences, "ops/a.py", "def f():\n    import megatron_replay.parallel", "a.py:2"),
        (import_offences, "errors.py", "from megatron_replay import cli", "errors may not import"),
        (import_offences, "device.py", "from megatron_replay.parallel import world", "device may not import"),
        (import_offences, "stages/train.py", "from megatron.core import parallel_state", "in parallel/ only"),
        (import_offences, "store/a.py", "import torch", "does without torch"),
        (import_offences, "helpers.py", "", "stands in no layer"),
        (
            room_offences,
            "parallel/ranks/a.py",
            "from megatron_replay.parallel.mcore.model import Model",
            "ranks may not",
        ),
        (room_offences, "parallel/a.py", "from megatron_replay.parallel import checkpoints", "parallel may not import"),
        (relative_offences, "ops/a.py", "from .shard import VocabShard", "a.py:1: a relative import"),
        (word_offences, "optim/a.py", "x = 'nccl'", "says 'nccl'"),
        (word_offences, "parallel/trainer.py", "y = torch.ops.npu.npu_rms_norm(x)", "says 'torch.ops.npu'"),
        (word_offences, "parallel/shims/installation.py", "x = torch.cuda", "says 'torch.cuda'"),
        (state_offences, "ops/a.py", "def f():\n    global x\n    x = 1", "a.py:2: a global statement"),
        (state_offences, "cli.py", "import os\nx = os.environ['A']", "cli.py:2: reads"),
        (state_offences, "cli.py", "from os import environ", "reads"),
        (
            import_time_offences,
            "ops/a.py",
            "import torch\ntry:\n    torch.add = None\nexcept ValueError:\n    pass",
            "a.py:3: changes",
        ),
        (import_time_offences, "parallel/a.py", "install()", "install() is work at import"),
        (import_time_offences, "ops/a.py", "import torch\nsetattr(torch, 'add', None)", "setattr() is work"),
    ],
)
def test_each_rule_sees_its_offence(tmp_path: Path, rule: object, inner: str, text: str, says: str) -> None:
    path = tmp_path / PACKAGE / inner
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    offences = list(rule(tmp_path))  # type: ignore[operator]
    assert any(says in offence for offence in offences), offences


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (
            "parallel/a.py",
            "from megatron.core import parallel_state\nfrom megatron_replay.ops import VocabShard\n"
            "from megatron_replay.parallel.ranks import world",
        ),
        (
            "stages/a.py",
            "from megatron_replay.parallel.ranks import spawn\nfrom megatron_replay.errors import DataError",
        ),
        (
            "kernels/a.py",
            "import torch\nfrom megatron_replay.kernels.precision import accumulator\n"
            "LIBRARY = torch.library.Library('x', 'DEF')\nLIBRARY.define('y() -> ()')",
        ),
        ("parallel/ranks/world.py", "import os\n\n\ndef ranks():\n    return os.environ['RANK']"),
        ("__main__.py", "import sys\nif __name__ == '__main__':\n    sys.exit(0)"),
    ],
)
def test_what_is_right_passes(tmp_path: Path, inner: str, text: str) -> None:
    path = tmp_path / PACKAGE / inner
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    assert [offence for rule in RULES for offence in rule(tmp_path)] == []
