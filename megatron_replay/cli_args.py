"""Arguments after a verb: words, `section.key=value` overrides, flags, and Megatron's spellings of our keys."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_replay import config as config_module
from megatron_replay.config import ADAM_BETAS, RunConfig, load
from megatron_replay.errors import ConfigError
from megatron_replay.registry import nearest

ALIASES = {
    "tensor-model-parallel-size": "layout.tensor",
    "pipeline-model-parallel-size": "layout.pipeline",
    "sequence-parallel": "layout.sequence_parallel=true",
    "use-distributed-optimizer": "layout.zero1=true",
    "micro-batch-size": "batch.micro",
    "global-batch-size": "batch.total",
    "seq-length": "data.seq_length",
    "train-iters": "train.iters",
    "load": "train.load",
    "save": "train.save",
    "save-interval": "train.save_interval",
    "log-interval": "train.log_interval",
    "profile": "train.profile=[2,4]",
    "lr": "optimizer.lr",
    "min-lr": "schedule.min_lr",
    "lr-decay-style": "schedule.style",
    "lr-warmup-iters": "schedule.warmup_iters",
    "weight-decay": "optimizer.weight_decay",
    "clip-grad": "optimizer.clip_grad",
    "adam-beta1": "optimizer.betas.0",
    "adam-beta2": "optimizer.betas.1",
    "seed": "seed",
    "bf16": "precision=bf16",
    "device": "device",
}
"""Flag -> our key. A flag whose entry has a value takes none."""

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
_ONE_BETA = re.compile(r"optimizer\.betas\.([01])=(.*)")

WIDTH = 118
"""Columns of help texts."""


@dataclass
class Arguments:
    """The arguments read after the verb."""

    words: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str] = field(default_factory=dict)
    """The verb's own flags that were given; the value is empty for those that take none."""
    command: list[str] = field(default_factory=list)
    """The command line of another verb, which followed."""


def read(
    tokens: Sequence[str], own: Mapping[str, bool], *, keys: bool = True, spellings: Mapping[str, str] = ALIASES
) -> Arguments:
    """Sort the tokens after a verb.

    - own: the verb's flags, and whether each takes a value.
    - keys: whether the verb has a configuration.
    - spellings: the flags that set keys of the configuration, and these keys.

    Everything after `--` is a word. Raises ConfigError for an unknown flag (with the nearest one), a missing value, or
    a value too many.
    """
    given = Arguments()
    takes_value = {**({flag: "=" not in key for flag, key in spellings.items()} if keys else {}), **own}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token == "--":
            given.words += rest
            break
        if token.startswith("--"):
            name, has_value, value = token[2:].partition("=")
            if name not in takes_value:
                hint = nearest(
                    f"--{name}", [f"--{known}" for known in takes_value], otherwise="--help lists the known ones"
                )
                raise ConfigError(f"unknown flag '--{name}'; {hint}")
            if has_value and not takes_value[name]:
                raise ConfigError(f"--{name} takes no value, got {value!r}")
            if takes_value[name] and not has_value:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"--{name} needs a value: --{name} VALUE")
                value = rest.pop(0)
            if name in own:
                given.flags[name] = value
            else:
                given.overrides.append(spellings[name] + f"={value}" * takes_value[name])
        elif keys and _OVERRIDE.match(token):
            given.overrides.append(token)
        else:
            given.words.append(token)
    return given


def is_file(word: str) -> bool:
    """True where a word names a configuration file: by its ending, or because the file is there."""
    return word.endswith((".yaml", ".yml")) or Path(word).is_file()


def configuration(path: str | None, overrides: Sequence[str]) -> RunConfig:
    """The RunConfig of a file and overrides, the last one winning.

    `optimizer.betas.0=` and `.1=` change one beta and leave the other, which is Adam's where none is set.
    """
    plain = [item for item in overrides if not item.startswith("optimizer.betas")]
    betas: list[str] = []
    for item in overrides:
        one = _ONE_BETA.fullmatch(item)
        if one:
            pair: list[object] = list(load(RunConfig, path, plain + betas).optimizer.betas or ADAM_BETAS)
            pair[int(one[1])] = one[2]
            item = f"optimizer.betas=[{', '.join(map(str, pair))}]"
        if item.startswith("optimizer.betas"):
            betas.append(item)
    return load(RunConfig, path, plain + betas)


def keys_help(sections: Sequence[str]) -> str:
    """The top-level keys and those of the sections, each with its default and its docstring in config.py."""
    tree = ast.parse(Path(config_module.__file__).read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    top = {f.name: f for f in dataclasses.fields(RunConfig)}
    lines = ["Keys (YAML, or section.key=value)", *_fields(classes["RunConfig"], RunConfig(), "")]
    for section in sections:
        kind = classes[str(top[section].type)]
        lines += [
            "",
            textwrap.fill(f"{section}: {ast.get_docstring(kind)}", WIDTH) if ast.get_docstring(kind) else f"{section}:",
        ]
        lines += _fields(kind, getattr(RunConfig(), section), f"{section}.")
    return "\n".join(lines)


def fields_help(kind: type) -> list[str]:
    """The keys of a dataclass, each with its default and its docstring."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    return _fields(definition, kind(), "")


def _fields(kind: ast.ClassDef, defaults: object, prefix: str) -> list[str]:
    lines = []
    registered = {f.name: f.metadata.get("registered") for f in dataclasses.fields(defaults)}  # type: ignore[arg-type]
    for node, after in zip(kind.body, [*kind.body[1:], None], strict=True):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        value = getattr(defaults, node.target.id)
        if dataclasses.is_dataclass(value) or isinstance(value, dict):
            continue
        said = (
            [" ".join(ast.literal_eval(after.value).split())]
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            else []
        )
        if isinstance(node.annotation, ast.Subscript) and ast.unparse(node.annotation.value) == "Literal":
            said.insert(0, " | ".join(ast.literal_eval(node.annotation.slice)) + ".")
        if folder := registered[node.target.id]:
            names = _registered(Path(config_module.__file__).parent / folder)
            said.insert(0, " | ".join(sorted(names, key=lambda name: (name != value, name))) + ".")
        lines.append(entry(f"{prefix}{node.target.id}={_yaml(value)}", " ".join(" ".join(said).split())))
    return lines


def _registered(folder: Path) -> list[str]:
    """The names in the `@REGISTRY.register("name")` lines of a folder's files, which may need torch to be imported."""
    return [
        ast.literal_eval(decorator.args[0])
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith(".register")
    ]


def _yaml(value: object) -> str:
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def entry(name: str, meaning: str, column: int = 42) -> str:
    """One entry of a help text: the name, and from `column` on its meaning. A long meaning takes more lines."""
    head = f"  {name}".ljust(column - 1) + " "
    return (
        textwrap.fill(meaning, WIDTH, initial_indent=head, subsequent_indent=" " * column) if meaning else head.rstrip()
    )
