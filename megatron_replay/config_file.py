"""Frozen dataclasses from defaults, a YAML file and dotted overrides, and back. Every mistake names its key.

Sections are nested dataclasses. A field with `metadata={"rest": True}` takes the keys that its section does not know.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from megatron_replay.errors import ConfigError
from megatron_replay.registry import nearest

T = TypeVar("T")


def load(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build `cls` from its defaults, then the YAML file, then `section.key=value` overrides; the last one wins.

    Raises ConfigError for a file that is missing or no YAML mapping, an unknown key (with the nearest name), or a value
    of another type.
    """
    tree = _read(Path(path)) if path else {}
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep:
            raise ConfigError(f"override {item!r} has no '='; write it as section.key=value")
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {item!r}: {name!r} is a value, not a section")
        try:
            node[leaf] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[leaf] = text
    return build(cls, tree)


def build(cls: type[T], tree: Mapping[str, Any]) -> T:
    """Build `cls` from a nested mapping, as `load` does from YAML."""
    return typing.cast(T, _build(cls, dict(tree), ""))


def dump(config: Any) -> str:
    """The YAML that `load` reads back to an equal config."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections in sections."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        first, _, rest = str(key).partition(".")
        inner = nested({rest: value}) if rest else nested(value) if isinstance(value, Mapping) else value
        tree = over(tree, {first: inner})
    return tree


def over(tree: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`upper` laid over `tree`, section by section."""
    merged = dict(tree)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = over(below if isinstance(below, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return merged


def changed(config: Any) -> dict[str, Any]:
    """The keys of a config whose values are not the default, as a tree that `build` takes."""
    return _differing(_plain(config), _plain(type(config)()))


def _differing(tree: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        same = isinstance(value, dict) and isinstance(default.get(key), dict)
        inner = _differing(value, default[key]) if same else value
        if key not in default or inner not in (default[key], {}):
            found[key] = inner
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{path}: cannot read the configuration: {err.strerror}") from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        mark = getattr(err, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{path}{where}: not valid YAML: {getattr(err, 'problem', err)}; write plain 'key: value' lines"
        ) from err
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines, got {type(tree).__name__}")
    return tree


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        flat: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            inner = _plain(getattr(value, f.name))
            flat.update(inner) if f.metadata.get("rest") else flat.__setitem__(f.name, inner)
        return flat
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _build(kind: Any, value: Any, where: str) -> Any:
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return _coerce(kind, value, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where or 'the configuration'}: expected a section with keys, got {value!r}")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    rest = next((f.name for f in fields if f.metadata.get("rest")), None)
    names = [f.name for f in fields if f.name != rest]
    known: dict[str, Any] = {}
    further: dict[str, Any] = {}
    for key, item in value.items():
        if key in names:
            known[key] = _build(hints[key], item, _join(where, key))
        elif rest is not None:
            further[str(key)] = item
        else:
            hint = nearest(str(key), names, otherwise=f"known keys: {', '.join(names)}")
            raise ConfigError(f"{_join(where, key)}: unknown key; {hint}")
    if rest is not None:
        known[rest] = further
    try:
        return kind(**known)
    except ConfigError as err:
        raise ConfigError(_join(where, str(err))) from err


def _coerce(kind: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}{hint}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        return _build(next((a for a in kinds if typing.get_origin(a) is type(value)), kinds[0]), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected names and values, got {value!r}")
        return {str(name): _build(args[1], inner, _join(where, name)) for name, inner in value.items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_build(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            pass
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a folder named 2024 is a name, not a number
    if kind is str and value is None:
        return ""
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
