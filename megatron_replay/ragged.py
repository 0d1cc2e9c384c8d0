"""Ragged tables as structs of arrays, of numpy or torch alike: N positions, each owning a run of the entries.

A table is a frozen dataclass of columns, and each field says in its metadata what the column runs along. So moving,
slicing and joining are written here once, for every column of every table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Generic, TypeVar

from typing_extensions import Self

A = TypeVar("A", bound=Any)
"""The type of the arrays."""


def per_position(dtype: str) -> dict[str, str]:
    """Metadata of a column [N]; `dtype` is a name that numpy and torch share."""
    return {"along": "position", "dtype": dtype}


def per_entry(dtype: str) -> dict[str, str]:
    """Metadata of a column [entries]."""
    return {"along": "entry", "dtype": dtype}


@dataclass(frozen=True, eq=False)
class Ragged(Generic[A]):
    """Base of the tables; a column that may be absent is None where it is."""

    offsets: A = field(metadata={"along": "edge", "dtype": "int64"})
    """[N + 1] int64, from 0: position t owns the entries offsets[t]:offsets[t + 1]."""

    @property
    def num_positions(self) -> int:
        return len(self.offsets) - 1

    def sizes(self) -> A:
        """[N] int64: entries of each position."""
        sizes: A = self.offsets[1:] - self.offsets[:-1]
        return sizes

    @classmethod
    @cache
    def dtypes(cls) -> dict[str, str]:
        """The declared type of each column, by name."""
        return {column.name: column.metadata["dtype"] for column in fields(cls)}

    def columns(self) -> dict[str, A]:
        """The columns that are there, by name."""
        found = {column.name: getattr(self, column.name) for column in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    def map(self, change: Callable[[A], A]) -> Self:
        """The same table with every column changed: copied, or moved to a device."""
        return replace(self, **{name: change(array) for name, array in self.columns().items()})

    def rows(self, start: int, stop: int) -> Self:
        """The positions start..stop - 1 as a table of their own, in views of these arrays."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        span = {"edge": slice(start, stop + 1), "position": slice(start, stop), "entry": slice(first, last)}
        along = {column.name: span[column.metadata["along"]] for column in fields(self)}
        cut = {name: array[along[name]] for name, array in self.columns().items()}
        return replace(self, **{**cut, "offsets": cut["offsets"] - first})

    @classmethod
    def joined(cls, parts: Sequence[Self], concatenate: Callable[[list[A]], A]) -> Self:
        """The positions of all parts, one at least, in order; a column that a part lacks is absent."""
        values: dict[str, Any] = {}
        for name in cls.dtypes():
            arrays = [getattr(part, name) for part in parts]
            values[name] = None if any(array is None for array in arrays) else concatenate(arrays)
        ends = concatenate([part.sizes() for part in parts]).cumsum(0)
        return cls(**{**values, "offsets": concatenate([parts[0].offsets[:1], ends])})

    def misfits(self, positions: int, entries: int) -> Iterator[tuple[str, int]]:
        """(name, length it should have) of each column whose shape is not that of so many positions and entries."""
        lengths = {"edge": positions + 1, "position": positions, "entry": entries}
        columns = self.columns()
        for column in fields(self):
            length = lengths[column.metadata["along"]]
            if column.name in columns and columns[column.name].shape != (length,):
                yield column.name, length
