"""The ragged table: constructors, concatenation, the part of one shard, and every rule `check` enforces."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from megatron_replay.errors import DataError
from megatron_replay.ops import CandidateSets, LocalSets, VocabShard


def three() -> CandidateSets:
    return CandidateSets.from_lists([[9, 2, 5], [7], [0, 9]], [5, 7, 9])


def test_lists_are_sorted_and_the_gold_slot_found() -> None:
    sets = three().check(10)
    assert sets.offsets.tolist() == [0, 3, 4, 6]
    assert sets.ids.tolist() == [2, 5, 9, 7, 0, 9]
    assert sets.gold_slot.tolist() == [1, 0, 1]
    assert (sets.num_positions, sets.sizes().tolist(), sets.gold().tolist()) == (3, [3, 1, 2], [5, 7, 9])
    assert [t.dtype for t in (sets.offsets, sets.ids, sets.gold_slot)] == [torch.int64, torch.int32, torch.int32]
    with pytest.raises(DataError, match="position 1: the gold id 8"):
        CandidateSets.from_lists([[1], [2]], [1, 8])


def test_numpy_arrays_come_in() -> None:
    sets = CandidateSets.from_arrays(
        np.array([0, 2], np.uint32), np.array([3, 8], np.uint32), np.array([1], np.uint16), lse=np.ones(1)
    )
    sets.check(9)
    assert (sets.gold().tolist(), sets.lse.tolist(), sets.logits) == ([8], [1.0], None)


def test_cat_puts_positions_in_order() -> None:
    sets = three()
    parts = [
        CandidateSets.from_lists([[9, 2, 5]], [5]),
        CandidateSets.cat([]),
        CandidateSets.from_lists([[7], [0, 9]], [7, 9]),
    ]
    whole = CandidateSets.cat(parts).check(10)
    assert (
        torch.equal(whole.ids, sets.ids)
        and torch.equal(whole.offsets, sets.offsets)
        and torch.equal(whole.gold_slot, sets.gold_slot)
    )
    logits = [dataclasses.replace(p, logits=p.ids.float()) for p in parts]
    assert torch.equal(CandidateSets.cat(logits).logits, sets.ids.float())
    assert CandidateSets.cat([logits[0], parts[2]]).logits is None
    assert sets.to("cpu").gold().tolist() == [5, 7, 9]


def test_the_shards_parts_make_up_the_whole() -> None:
    sets, group = three(), object()
    low, high = (sets.local(VocabShard(a, b, group)) for a, b in ((0, 5), (5, 10)))  # type: ignore[arg-type]
    assert (low.offsets.tolist(), low.columns.tolist(), low.gold.tolist()) == ([0, 1, 1, 2], [2, 0], [-1] * 3)
    assert (high.offsets.tolist(), high.columns.tolist()) == ([0, 2, 3, 4], [0, 4, 2, 4])
    assert high.gold.tolist() == [0, 2, 3]
    assert low.columns.dtype == torch.int32
    with pytest.raises(DataError, match="candidate id 9"):
        sets.local(VocabShard(0, 9))


def test_the_same_entries_by_column() -> None:
    here = three().local(VocabShard(0, 10)).indexed()
    index = here.by_column
    assert index is not None and here.indexed() is here
    assert (index.touched.tolist(), index.begins.tolist()) == ([0, 2, 5, 7, 9], [0, 1, 2, 3, 4, 6])
    assert here.columns[index.order].tolist() == [0, 2, 5, 7, 9, 9] and index.tokens.tolist() == [2, 0, 0, 1, 0, 2]
    assert {t.dtype for t in (index.touched, index.begins, index.tokens, index.order)} == {torch.int32}
    *table, factors = index.entries(torch.arange(6.0))
    assert (
        all(map(torch.equal, table, (index.touched, index.begins, index.tokens)))
        and factors.tolist() == index.order.tolist()
    )
    none = LocalSets(torch.zeros(1, dtype=torch.int64), here.columns[:0], here.gold[:0]).indexed().to("cpu").by_column
    assert (
        none is not None and none.begins.tolist() == [0] and not len(none.touched) + len(none.tokens) + len(none.order)
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offsets": [0, 3, 2, 6]}, "offsets must rise"),
        ({"offsets": [1, 3, 4, 6]}, "offsets must rise"),
        ({"offsets": [0, 3, 4, 5]}, "offsets must rise"),
        ({"offsets": [0, 4, 4, 6]}, "position 1 has no ids"),
        ({"ids": [5, 2, 9, 7, 0, 9]}, "entry 0 do not ascend"),
        ({"ids": [2, 5, 5, 7, 0, 9]}, "entry 1 do not ascend"),
        ({"ids": [2, 5, 10, 7, 0, 9]}, "entry 2 is not an id of a vocabulary of 10"),
        ({"ids": [-1, 5, 9, 7, 0, 9]}, "entry 0 is not an id"),
        ({"gold_slot": [1, 1, 1]}, "gold_slot of position 1"),
        ({"gold_slot": [1, 0, -1]}, "gold_slot of position 2"),
        ({"gold_slot": [1, 0]}, "gold_slot has shape"),
        ({"lse": [0.0]}, "lse has shape"),
        ({"logits": [0.0]}, "logits has shape"),
    ],
)
def test_each_broken_rule_is_named(change: dict[str, list[float]], says: str) -> None:
    broken = dataclasses.replace(three(), **{name: torch.tensor(value) for name, value in change.items()})
    with pytest.raises(DataError, match=says):
        broken.check(10)
