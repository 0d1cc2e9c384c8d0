"""Samples that begin alike, laid down as a forest: a shared prefix is stored once, and each sample goes on in a branch.

A forest is a table of segments [n, 3] (start, length, parent). A segment is a stretch of a flat row of T tokens.
`parent` is the table's row of the segment that it continues, or -1 where a sample begins. Parents stand before their
children, roots first, siblings side by side.

A sample is the path from a root to one segment. So a sample that is the beginning of another has no segment of its own.
Without shared prefixes every segment is a root.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SHORTEST = 16
"""The shortest prefix that is shared. Shorter ones are computed again: each branch costs attention a call."""

Ids = NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Tree:
    """Samples in a flat row."""

    tokens: NDArray[np.int64]
    """[T]"""
    segments: NDArray[np.int64]
    """[n, 3] start, length, parent."""
    where: list[NDArray[np.int64]]
    """The index in the row of each token of each sample: [length] for each."""

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def position_ids(self) -> NDArray[np.int64]:
        """The position [T] of each token within its sample."""
        return position_ids(self.segments)


def position_ids(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position [T] of each token in its samples: a branch counts on from the end of its parent."""
    begins: list[int] = []
    for _, _, parent in segments.tolist():
        begins.append(begins[parent] + int(segments[parent, 1]) if parent >= 0 else 0)
    parts = [np.arange(begin, begin + length) for begin, length in zip(begins, segments[:, 1].tolist(), strict=True)]
    return _joined(parts)


def lay(samples: Sequence[Ids], *, share_prefixes: bool) -> Tree:
    """The samples in a row: as a forest with `share_prefixes`, else one after the other."""
    forest = Forest(share_prefixes=share_prefixes)
    for ids in samples:
        forest.add(ids)
    return forest.tree()


@dataclass(eq=False)
class _Node:
    """The tokens ids[start:stop] of the sample that brought them."""

    parent: _Node | None
    ids: Ids
    start: int
    stop: int
    children: list[_Node] = field(default_factory=list)
    known: dict[bytes, _Node] = field(default_factory=dict)
    """The children by their first `SHORTEST` tokens, in which no two agree."""
    short: list[_Node] = field(default_factory=list)
    """Children of fewer tokens that have children of their own: the rest of a segment that was split near its end."""


class Forest:
    """A forest that grows by one sample at a time.

    A prefix once shared stays shared, so `cost` knows beforehand the tokens that a sample adds.
    """

    def __init__(self, *, share_prefixes: bool = True) -> None:
        self._share_prefixes = share_prefixes
        self._top = _Node(None, np.zeros(0, np.int64), 0, 0)
        self._ends: list[_Node] = []
        self._size = 0

    def __len__(self) -> int:
        """The number of tokens in all segments."""
        return self._size

    def cost(self, ids: Ids) -> int:
        """The number of tokens that `add` would add."""
        return len(ids) - self._walk(ids)[1]

    def add(self, ids: Ids) -> None:
        node, depth = self._walk(ids)
        if depth < node.stop:
            node = _split(node, depth)
        if depth < len(ids):
            leaf = _Node(node, ids, depth, len(ids))
            node.children.append(leaf)
            if len(ids) - depth >= SHORTEST:
                node.known[_key(ids, depth)] = leaf
            self._size += len(ids) - depth
            node = leaf
        self._ends.append(node)

    def _walk(self, ids: Ids) -> tuple[_Node, int]:
        """The node in which, or at whose end, this sample leaves the forest; and the number of tokens in common."""
        node, depth = self._top, 0
        while self._share_prefixes and depth == node.stop and (child := _next(node, ids)) is not None:
            node, depth = child, _agree(child, ids)
        return node, depth

    def tree(self) -> Tree:
        """The forest so far; `where` is in the order in which the samples were added."""
        nodes = list(self._top.children)
        parents = [-1] * len(nodes)
        for number, node in enumerate(nodes):  # grows while it is read: breadth first
            nodes += node.children
            parents += [number] * len(node.children)
        lengths = np.array([node.stop - node.start for node in nodes], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        begin = {id(node): int(start) for node, start in zip(nodes, starts, strict=True)}
        return Tree(
            _joined([node.ids[node.start : node.stop] for node in nodes]),
            np.stack([starts, lengths, np.array(parents, dtype=np.int64)], 1),
            [self._where(end, begin) for end in self._ends],
        )

    def _where(self, node: _Node, begin: dict[int, int]) -> NDArray[np.int64]:
        parts = []
        while node.parent is not None:
            start = begin[id(node)]
            parts.append(np.arange(start, start + node.stop - node.start))
            node = node.parent
        return _joined(parts[::-1])

    def order(self, ranked: Iterable[int]) -> list[int]:
        """`ranked`, which holds all samples in some order, rearranged so that samples that begin alike stand together.

        Branches, and samples within a branch, come in the order of their first sample in `ranked`.
        """
        held: dict[int, list[int | _Node]] = {id(self._top): []}
        for index in ranked:
            item: int | _Node = index
            node: _Node | None = self._ends[index]
            while node is not None:
                if id(node) in held:
                    held[id(node)].append(item)
                    break
                held[id(node)] = [item]
                item, node = node, node.parent
        found: list[int] = []
        stack: list[int | _Node] = [self._top]
        while stack:
            item = stack.pop()
            if isinstance(item, _Node):
                stack += reversed(held[id(item)])
            else:
                found.append(item)
        return found


def forest(samples: Iterable[Ids]) -> Forest:
    """All samples in one forest."""
    grown = Forest()
    for ids in samples:
        grown.add(ids)
    return grown


def rows(samples: Sequence[Ids], order: Iterable[int], capacity: int) -> list[list[int]]:
    """Cut samples in this order into rows of at most `capacity` tokens.

    Shared tokens count once. A sample longer than `capacity` stands alone.
    """
    found: list[list[int]] = []
    row = Forest()
    for index in order:
        if not found or len(row) + row.cost(samples[index]) > capacity:
            row = Forest()
            found.append([])
        row.add(samples[index])
        found[-1].append(index)
    return found


def _next(node: _Node, ids: Ids) -> _Node | None:
    """The child along which a sample goes on, if sharing it is worth a branch."""
    depth = node.stop
    if len(ids) - depth >= SHORTEST and (child := node.known.get(_key(ids, depth))) is not None:
        return child
    return next((child for child in node.short if len(ids) >= child.stop and _agree(child, ids) == child.stop), None)


def _agree(node: _Node, ids: Ids) -> int:
    """The depth until which a sample has the tokens of this node."""
    stop = min(node.stop, len(ids))
    differ = node.ids[node.start : stop] != ids[node.start : stop]
    return node.start + int(differ.argmax()) if differ.any() else stop


def _split(node: _Node, depth: int) -> _Node:
    """Cut a node in two; returns the upper part. Samples that end at the node stay with the lower part."""
    parent = node.parent
    assert parent is not None and depth - node.start >= SHORTEST
    head = _Node(parent, node.ids, node.start, depth, [node])
    parent.children[parent.children.index(node)] = head
    parent.known[_key(node.ids, node.start)] = head
    node.parent, node.start = head, depth
    if node.stop - depth >= SHORTEST:
        head.known[_key(node.ids, depth)] = node
    elif node.children:
        head.short.append(node)
    return head


def _key(ids: Ids, start: int) -> bytes:
    return ids[start : start + SHORTEST].astype(np.int64, copy=False).tobytes()


def _joined(parts: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
    return np.concatenate(parts).astype(np.int64, copy=False) if parts else np.zeros(0, dtype=np.int64)
