"""Samples to rows to batches, on any layout of ranks.

A row is a list of sample indices whose lengths add up to at most the capacity. Everything here is a pure function of
lengths, seed and step. The layout of the ranks comes in last, in `rank_micro_batches`, and resuming needs the step
number alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_replay.data import prefixes
from megatron_replay.errors import DataError, LayoutError

Row = list[int]

OPEN_ROWS = 32
"""Rows that still take samples. More of them fill better, but cost time and join samples from farther apart."""


def order(n: int, seed: int, epoch: int, shuffle: bool = True) -> NDArray[np.int64]:
    """The order [n] of an epoch's samples, the same on every layout and numpy version.

    PCG64's raw stream is fixed across versions; numpy's shuffle is not.
    """
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    keys = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64)


def pack(
    lengths: Sequence[int] | NDArray[np.integer],
    capacity: int,
    *,
    packing: bool = True,
    order: Sequence[int] | NDArray[np.integer] | None = None,
) -> list[Row]:
    """Rows of sample indices, in `order` (by default ascending).

    packing: each sample goes to the first open row that has room for it, else to a new row. The oldest row closes when
    there are more than `OPEN_ROWS`. Every sample stands in exactly one row. False gives one sample a row.

    Raises DataError for a sample longer than `capacity`.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    _check(sizes, capacity)
    indices = np.arange(len(sizes)) if order is None else np.asarray(order)
    if not packing:
        return [[int(i)] for i in indices]
    rows: list[Row] = []
    rooms: list[list[int]] = []  # [room, row] of each open row, oldest first
    for index, size in zip(indices.tolist(), sizes[indices].tolist(), strict=True):
        for slot in rooms:
            if slot[0] >= size:
                slot[0] -= size
                rows[slot[1]].append(index)
                break
        else:
            rooms.append([capacity - size, len(rows)])
            rows.append([index])
            if len(rooms) > OPEN_ROWS:
                rooms.pop(0)
    return rows


class Grouping:
    """Rows of samples that begin alike.

    The samples of a row may add up to more tokens than `capacity`, because a shared prefix counts once.
    """

    def __init__(self, samples: Sequence[NDArray[np.integer]], capacity: int) -> None:
        _check(np.array([len(ids) for ids in samples]), capacity)
        self._samples, self._capacity = samples, capacity
        self._forest = prefixes.forest(samples)

    def rows(self, seed: int, epoch: int, shuffle: bool = True) -> list[Row]:
        """The rows of one epoch, in random order.

        Branches are in random order too, as are the samples of each. They are cut into rows in that order.
        """
        ordered = self._forest.order(order(len(self._samples), seed, epoch, shuffle).tolist())
        rows = prefixes.rows(self._samples, ordered, self._capacity)
        return [rows[i] for i in order(len(rows), seed + 1, epoch, shuffle)]


def _check(sizes: NDArray[np.int64], capacity: int) -> None:
    if len(sizes) and sizes.max() > capacity:
        longest = int(sizes.argmax())
        raise DataError(
            f"sample {longest} has {sizes[longest]} tokens, but a row holds {capacity}; raise data.seq_length, or set "
            "data.over_length"
        )


def batches(rows: Sequence[Row], total: int) -> list[list[Row]]:
    """Cut rows into batches of `total`, of which the last may be smaller."""
    return [list(rows[i : i + total]) for i in range(0, len(rows), total)]


def rank_micro_batches(rows: Sequence[Row], dp_rank: int, dp_size: int, micro: int) -> list[list[Row]]:
    """The micro-batches of one data-parallel rank.

    The rows of a rank are contiguous, so joining all ranks' rows in order gives the batch back. Raises LayoutError
    unless the number of rows is a multiple of dp_size * micro.
    """
    if len(rows) % (dp_size * micro):
        raise LayoutError(
            f"a batch of {len(rows)} rows cannot be dealt to {dp_size} data-parallel ranks in micro-batches of "
            f"{micro}; make batch.total a multiple of {dp_size * micro}"
        )
    size = len(rows) // dp_size
    return batches(rows[dp_rank * size : (dp_rank + 1) * size], micro)


def windows(
    ids: Sequence[int] | NDArray[np.integer], window: int, tokens: int | None = None
) -> list[NDArray[np.int32]]:
    """The first `tokens` ids of a text, cut into windows of `window` ids that do not overlap: for perplexity.

    Each window predicts all of its ids but the first. The last window may be shorter. A single id left over is dropped,
    as it predicts nothing. Raises DataError when nothing is predicted.
    """
    kept = np.asarray(ids, dtype=np.int32)[:tokens]
    if window < 2 or len(kept) < 2:
        raise DataError(
            f"perplexity needs at least 2 tokens in the text and in a window, got {len(kept)} and {window}; give a "
            "longer text or window"
        )
    parts = [kept[i : i + window] for i in range(0, len(kept), window)]
    return [part for part in parts if len(part) > 1]


def sliding_windows(
    ids: Sequence[int] | NDArray[np.integer], window: int, stride: int, tokens: int | None = None
) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    """(ids, positions) of windows of `window` ids that overlap: each predicts what the ones before did not.

    Ends lie `stride` ids apart, the last one at the text's end. So every id but the first is predicted exactly once,
    with at least window - stride ids of context where the text has as many. Position p predicts the window's id p + 1.
    A text of fewer than 2 ids has no window.
    """
    kept = np.asarray(ids, dtype=np.int32)[:tokens]
    if len(kept) < 2:
        return []
    parts, predicted = [], 1
    for end in [*range(min(window, len(kept)), len(kept), stride), len(kept)]:
        first = max(0, end - window)
        parts.append((kept[first:end], np.arange(predicted - 1, end - 1) - first))
        predicted = end
    return parts


class Stream:
    """The rows of all epochs one after another, cut into global batches of `total` rows.

    The first rows of the next epoch fill the last batch of an epoch. So every batch is full and no sample is left out.
    `grouping` makes the rows of an epoch in place of `pack`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.integer],
        seed: int,
        capacity: int,
        packing: bool,
        shuffle: bool,
        total: int,
        grouping: Grouping | None = None,
    ) -> None:
        if len(lengths) == 0:
            raise DataError("there are no samples to make batches of; check data.path")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._seed, self._capacity, self._packing, self._shuffle, self.total = seed, capacity, packing, shuffle, total
        self._grouping = grouping
        self._starts = [0]  # the row number at which each epoch begins, as far as known
        self.rows = lru_cache(maxsize=2)(self._rows)  # a batch spans two epochs at most, unless they are short

    def _rows(self, epoch: int) -> list[Row]:
        """The rows of one epoch (cached as `rows`)."""
        if self._grouping is not None:
            return self._grouping.rows(self._seed, epoch, self._shuffle)
        ordered = order(len(self._lengths), self._seed, epoch, self._shuffle)
        return pack(self._lengths, self._capacity, packing=self._packing, order=ordered)

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self.rows(len(self._starts) - 1)))
        return self._starts[epoch]

    def batch(self, step: int) -> list[Row]:
        """The `total` rows of step 0, 1, ...; a pure function of the step."""
        first = step * self.total
        epoch = 0
        while self._start(epoch + 1) <= first:
            epoch += 1
        found: list[Row] = []
        skip = first - self._start(epoch)
        while len(found) < self.total:
            found += self.rows(epoch)[skip : skip + self.total - len(found)]
            skip, epoch = 0, epoch + 1
        return found

    def epoch_of(self, step: int) -> float:
        """The passes over the data before this step."""
        row, epoch = step * self.total, 0
        while self._start(epoch + 1) <= row:
            epoch += 1
        return epoch + (row - self._start(epoch)) / len(self.rows(epoch))

    def num_steps(self, epochs: float) -> int:
        """The steps that see the rows of `epochs` passes over the data, at least 1.

        The last one may begin the next pass.
        """
        whole = int(epochs)
        rows = self._start(whole) + (epochs - whole) * (len(self.rows(whole)) if epochs > whole else 0)
        return max(1, math.ceil(rows / self.total))
