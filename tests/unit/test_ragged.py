"""A ragged table of any columns is moved, cut and joined alike in numpy and in torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from megatron_replay.ragged import Ragged, per_entry, per_position

SIZES = [2, 0, 3, 1]


@dataclass(frozen=True, eq=False)
class Table(Ragged[Any]):
    entries: Any = field(metadata=per_entry("int32"))
    weights: Any = field(metadata=per_position("float32"))
    extra: Any = field(default=None, metadata=per_entry("int32"))


Make = Callable[[Any], Any]
KINDS = [pytest.param(np.array, np.concatenate, id="numpy"), pytest.param(torch.tensor, torch.cat, id="torch")]


def table(make: Make, *, extra: bool = True) -> Table:
    entries = list(range(sum(SIZES)))
    offsets = make([0, *np.cumsum(SIZES).tolist()])
    return Table(offsets, make(entries), make([0.5, 1.5, 2.5, 3.5]), make(entries) * 10 if extra else None)


def lists(found: Table) -> dict[str, list[Any]]:
    return {name: column.tolist() for name, column in found.columns().items()}


@pytest.mark.parametrize(("make", "concatenate"), KINDS)
def test_the_parts_of_a_table_join_to_the_table(make: Make, concatenate: Make) -> None:
    whole = table(make)
    assert whole.num_positions == 4 and whole.sizes().tolist() == SIZES
    for cuts in ([0, 4], [0, 1, 4], [0, 0, 2, 3, 4, 4]):
        parts = [whole.rows(a, b) for a, b in pairwise(cuts)]
        assert all(part.offsets.tolist()[0] == 0 for part in parts)
        assert lists(Table.joined(parts, concatenate)) == lists(whole)
    middle = whole.rows(1, 3)
    assert lists(middle) == {"offsets": [0, 0, 3], "entries": [2, 3, 4], "weights": [1.5, 2.5], "extra": [20, 30, 40]}


@pytest.mark.parametrize(("make", "concatenate"), KINDS)
def test_a_column_that_is_absent_stays_absent(make: Make, concatenate: Make) -> None:
    without = table(make, extra=False)
    assert "extra" not in without.columns() and without.rows(0, 2).extra is None and without.map(len).extra is None
    assert Table.joined([table(make), without], concatenate).extra is None
    assert Table.joined([table(make)] * 2, concatenate).extra is not None


@pytest.mark.parametrize(("make", "concatenate"), KINDS)
def test_map_changes_every_column(make: Make, concatenate: Make) -> None:
    doubled = table(make).map(lambda column: column * 2)
    assert lists(doubled) == {name: [2 * value for value in column] for name, column in lists(table(make)).items()}


@pytest.mark.parametrize(("make", "concatenate"), KINDS)
def test_columns_that_do_not_fit_are_named(make: Make, concatenate: Make) -> None:
    whole = table(make)
    assert list(whole.misfits(4, 6)) == []
    wrong = replace(whole, weights=make([1.0]), extra=make([[1]] * 6))
    assert list(wrong.misfits(4, 6)) == [("weights", 4), ("extra", 6)]


def test_types_are_declared_once() -> None:
    assert Table.dtypes() == {"offsets": "int64", "entries": "int32", "weights": "float32", "extra": "int32"}
