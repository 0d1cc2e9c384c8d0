from __future__ import annotations

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.config import Data
from megatron_replay.data import prefixes
from megatron_replay.data.packing import Grouping, Stream, order
from megatron_replay.data.prefixes import SHORTEST, Forest, Tree, forest, lay, position_ids, rows
from megatron_replay.errors import ConfigError, DataError


@st.composite
def families(draw: st.DrawFn) -> list[np.ndarray]:
    """Samples put together from a few stretches, so that they begin alike at every depth, are beginnings of each other,
    or equal."""
    stretches = [
        np.full(length, token)
        for token, length in enumerate(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    ]
    recipes = draw(
        st.lists(st.lists(st.integers(0, len(stretches) - 1), min_size=1, max_size=5), min_size=1, max_size=20)
    )
    samples = [np.concatenate([stretches[i] for i in recipe]) for recipe in recipes]
    return [ids[: draw(st.integers(1, len(ids)))].astype(np.int32) for ids in samples]


@given(samples=families(), share=st.booleans())
@settings(deadline=None, max_examples=300)
def test_unfolding_gives_the_samples_back(samples: list[np.ndarray], share: bool) -> None:
    tree = lay(samples, share_prefixes=share)
    for ids, where in zip(samples, tree.where, strict=True):
        assert tree.tokens[where].tolist() == ids.tolist()
        assert tree.position_ids[where].tolist() == list(range(len(ids)))
    assert sorted(set(chain(*(w.tolist() for w in tree.where)))) == list(range(len(tree))), (
        "every token is some sample's"
    )


@given(samples=families())
@settings(deadline=None, max_examples=300)
def test_a_sample_is_a_path_of_whole_segments(samples: list[np.ndarray]) -> None:
    tree = lay(samples, share_prefixes=True)
    table = [tuple(row) for row in tree.segments.tolist()]
    assert [start for start, _, _ in table] == np.cumsum([0, *(length for _, length, _ in table)]).tolist()[:-1]
    parents = [parent for _, _, parent in table]
    assert parents == sorted(parents) and all(parent < i for i, parent in enumerate(parents)), (
        "parents first, siblings side by side"
    )
    for where in tree.where:
        path, parent = [], -1
        while len(where):
            (i,) = [i for i, row in enumerate(table) if row[0] == where[0]]
            assert parents[i] == parent and where[: table[i][1]].tolist() == list(
                range(table[i][0], table[i][0] + table[i][1])
            )
            where, parent = where[table[i][1] :], i
            path.append(i)


@given(samples=families())
@settings(deadline=None, max_examples=300)
def test_no_long_beginning_is_there_twice(samples: list[np.ndarray]) -> None:
    tree = lay(samples, share_prefixes=True)
    for _, group in _siblings(tree).items():
        heads = [tuple(tree.tokens[start : start + SHORTEST]) for start, length in group if length >= SHORTEST]
        assert len(set(heads)) == len(heads)


def _siblings(tree: Tree) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for start, length, parent in tree.segments.tolist():
        found.setdefault(parent, []).append((start, length))
    return found


@given(samples=families())
@settings(deadline=None, max_examples=100)
def test_the_cost_of_a_sample_is_known_beforehand(samples: list[np.ndarray]) -> None:
    grown = Forest()
    for ids in samples:
        cost = grown.cost(ids)
        before = len(grown)
        grown.add(ids)
        assert len(grown) - before == cost
    assert len(grown) == len(grown.tree()) <= sum(map(len, samples))


def test_one_schema_many_questions() -> None:
    schema, other = np.arange(100), np.arange(200, 260)
    samples = [
        np.concatenate([begin, [1000 + i] * 20]) for i, begin in enumerate([schema, other, schema, other, schema])
    ]
    tree = lay(samples, share_prefixes=True)
    assert tree.segments.tolist() == [
        [0, 100, -1],
        [100, 60, -1],
        [160, 20, 0],
        [180, 20, 0],
        [200, 20, 0],
        [220, 20, 1],
        [240, 20, 1],
    ]
    assert position_ids(tree.segments)[[0, 99, 160, 179, 180, 220, 259]].tolist() == [0, 99, 100, 119, 100, 60, 79]


def test_prefixes_nest_and_split() -> None:
    a, b, c = (np.full(30, token) for token in (1, 2, 3))
    samples = [np.concatenate(parts) for parts in ([a, b, c], [a, b], [a, b, c], [a, c], [a, b, b])]
    tree = lay(samples, share_prefixes=True)
    assert tree.segments.tolist() == [[0, 30, -1], [30, 30, 0], [60, 30, 0], [90, 30, 1], [120, 30, 1]]
    assert [len(w) for w in tree.where] == [90, 60, 90, 60, 90] and tree.where[0].tolist() == tree.where[2].tolist()


def test_a_short_beginning_is_not_worth_it() -> None:
    for length in (SHORTEST - 1, SHORTEST):
        samples = [np.concatenate([np.zeros(length), np.full(30, i)]).astype(int) for i in (1, 2)]
        assert (len(lay(samples, share_prefixes=True).segments) == 2) == (length < SHORTEST)


def test_samples_that_each_begin_the_next() -> None:
    """A forest as deep as it gets."""
    samples = [np.zeros(length, np.int32) for length in range(1, 3000, SHORTEST)]
    for some in (samples, samples[::-1]):
        tree = lay(some, share_prefixes=True)
        assert len(tree) <= 3000 and all(len(w) == len(s) for w, s in zip(tree.where, some, strict=True))


@given(samples=families(), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_the_order_keeps_every_branch_together(samples: list[np.ndarray], seed: int) -> None:
    grown = forest(samples)
    ranked = order(len(samples), seed, 0).tolist()
    ordered = grown.order(ranked)
    assert sorted(ordered) == sorted(ranked) and ordered[0] == ranked[0]
    tree = grown.tree()
    for start, _, _ in tree.segments.tolist():
        held = [start in tree.where[i] for i in ordered]
        assert sum(a != b for a, b in pairwise([False, *held, False])) == 2, "those of a segment follow each other"


@given(samples=families(), room=st.integers(0, 60), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=100)
def test_grouped_rows_hold_every_sample_once(samples: list[np.ndarray], room: int, seed: int) -> None:
    capacity = max(map(len, samples)) + room
    found = Grouping(samples, capacity).rows(seed, 3)
    assert sorted(chain(*found)) == list(range(len(samples)))
    assert all(row and len(lay([samples[i] for i in row], share_prefixes=True)) <= capacity for row in found)
    assert found == Grouping(samples, capacity).rows(seed, 3)


def questions(schemas: int, each: int) -> list[np.ndarray]:
    """Schemas of 100 tokens with questions of 20, mixed."""
    return [np.concatenate([np.full(100, i % schemas), np.full(20, 1000 + i)]) for i in range(schemas * each)]


def test_grouped_rows_hold_more() -> None:
    samples = questions(8, 25)
    grouped = Grouping(samples, 300).rows(0, 0)
    assert len(grouped) < 30 and max(map(len, grouped)) == 10  # apart: 2 in a row, 100 rows
    assert all(len({i % 8 for i in row}) <= 2 for row in grouped)
    firsts = [row[0] % 8 for row in grouped]
    assert sum(a == b for a, b in pairwise(firsts)) < len(firsts) / 2, (
        "the rows of a schema are scattered over the epoch"
    )


def test_grouped_epochs_differ_and_a_step_needs_its_number_alone() -> None:
    samples = questions(8, 25)

    def stream(seed: int = 7) -> Stream:
        return Stream([len(ids) for ids in samples], seed, 300, True, True, 4, Grouping(samples, 300))

    whole = stream()
    assert {frozenset(row) for row in whole.rows(0)} != {frozenset(row) for row in whole.rows(1)}, (
        "who meets whom differs"
    )
    assert [stream().batch(step) for step in (11, 3, 0)] == [whole.batch(step) for step in (11, 3, 0)]
    assert stream(8).batch(0) != whole.batch(0)
    in_order = Grouping(samples, 300).rows(0, 0, shuffle=False)
    assert in_order[0] == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72]


def test_too_long_for_a_row() -> None:
    with pytest.raises(DataError, match=r"sample 1 has 120 tokens, but a row holds 110"):
        Grouping([np.zeros(5, int), np.zeros(120, int)], 110)
    assert rows([np.zeros(5, int), np.ones(120, int), np.ones(3, int)], [0, 1, 2], 110) == [[0], [1], [2]]


@pytest.mark.parametrize("wrong", [{}, {"share_prefixes": True, "packing": False}])
def test_grouping_without_sharing(wrong: dict[str, bool]) -> None:
    with pytest.raises(ConfigError, match="set share_prefixes=true and packing=true"):
        Data(group_prefixes=True, **wrong)


def test_forests_of_many_samples_grow_quickly() -> None:
    # a header too short to share
    samples = [np.concatenate([np.arange(8), np.full(100, i % 50), np.full(20, i)]) for i in range(5000)]
    assert len(prefixes.forest(samples)) == 50 * 108 + 5000 * 20
