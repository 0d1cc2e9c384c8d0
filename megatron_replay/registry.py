"""Name -> class: registering is one line, and a wrong name or option is answered with the nearest right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import typing_extensions

from megatron_replay.errors import ConfigError

T = TypeVar("T")
C = TypeVar("C", bound=type)

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def nearest(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message: `did you mean 'x'?`, or when none is near, `otherwise` or every known name."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise or f"known: {', '.join(names) or 'none'}"


class Registry(Generic[T]):
    """The classes of one kind, by name.

    >>> shapes = Registry("shape")
    >>> @shapes.register("circle")
    ... class Circle:
    ...     def __init__(self, *, radius: float = 1.0) -> None: ...
    >>> shapes.build("circle", radus=2)
    Traceback (most recent call last):
    megatron_replay.errors.ConfigError: shape 'circle' has no option 'radus'; did you mean 'radius'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. Registering two classes under one name is a fault of the program."""

        def add(cls: C) -> C:
            assert name not in self._classes, f"{self.kind} {name!r} is registered twice"
            self._classes[name] = cls
            return cls

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def get(self, name: str) -> type[T]:
        """The class of that name. Raises ConfigError with the nearest name."""
        if name not in self._classes:
            raise ConfigError(f"unknown {self.kind} {name!r}; {nearest(name, self._classes)}")
        return self._classes[name]

    def foreign(self, name: str, options: Iterable[str]) -> dict[str, str]:
        """The options that the class of that name does not take but another does: option -> a name that takes it."""
        own = _options(self.get(name))[0]
        takers = {
            option: [n for n in self._classes if option in _options(self._classes[n])[0]]
            for option in options
            if option not in own
        }
        return {option: names[0] for option, names in takers.items() if names}

    def build(self, name: str, *args: Any, **options: Any) -> T:
        """Construct the class of that name.

        `args` come from the program. `options` come from the user and are checked against the signature. Raises
        ConfigError for an option that the constructor does not take, takes already from `args`, or misses.
        """
        cls = self.get(name)
        known, takes_any = _options(cls, len(args))
        for option in options:
            if option not in known and not takes_any:
                raise ConfigError(f"{self.kind} {name!r} has no option {option!r}; {nearest(option, known)}")
        missing = [name for name, needed in known.items() if needed and name not in options]
        if missing:
            raise ConfigError(f"{self.kind} {name!r} needs option {missing[0]!r}")
        return cls(*args, **options)


def _options(cls: type, given: int = 0) -> tuple[dict[str, bool], bool]:
    """Keyword -> whether it is needed, of the parameters after the first `given`; and whether others are taken."""
    parameters = list(inspect.signature(cls).parameters.values())[given:]
    unpacked = _unpacked(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters) and not unpacked
    return {p.name: p.default is p.empty for p in parameters if p.kind in _BY_NAME} | unpacked, takes_any


def _unpacked(cls: type) -> dict[str, bool]:
    """The optional keyword arguments of a constructor's `**name: Unpack[SomeTypedDict]`, none of which is needed."""
    rest = next((p for p in inspect.signature(cls).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return {}
    # of the class, not of an instance
    hint = typing_extensions.get_type_hints(getattr(cls, "__init__")).get(rest.name)  # noqa: B009
    unpacked = typing_extensions.get_args(hint)
    return dict.fromkeys(typing_extensions.get_type_hints(unpacked[0]), False) if unpacked else {}
