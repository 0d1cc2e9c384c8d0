from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_replay.data.packing import (
    OPEN_ROWS,
    Stream,
    batches,
    order,
    pack,
    rank_micro_batches,
    sliding_windows,
    windows,
)
from megatron_replay.errors import DataError, LayoutError

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=120)


@given(n=st.integers(0, 200), seed=st.integers(-5, 2**70), epoch=st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(order(n, seed, epoch).tolist()) == list(range(n))
    assert order(n, seed, epoch).tolist() == order(n, seed, epoch).tolist()
    assert order(n, seed, epoch, shuffle=False).tolist() == list(range(n))


def test_order_differs_between_epochs_and_seeds_and_never_changes() -> None:
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in (1, 2, 42) for epoch in range(4)}
    assert len(orders) == 12
    assert order(8, 42, 0).tolist() == [4, 1, 3, 6, 0, 7, 2, 5]  # resumed runs depend on it


@given(lengths=LENGTHS, room=st.integers(0, 60), packing=st.booleans(), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_every_sample_once_and_no_row_too_long(lengths: list[int], room: int, packing: bool, seed: int) -> None:
    capacity = max(lengths) + room
    rows = pack(lengths, capacity, packing=packing, order=order(len(lengths), seed, 0))
    assert sorted(chain(*rows)) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= capacity for row in rows)
    if not packing:
        assert [i for (i,) in rows] == order(len(lengths), seed, 0).tolist()


def test_packing_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 600, size=3000)
    rows = pack(lengths, 2048, order=order(3000, 1, 0))
    assert lengths.sum() / (len(rows) * 2048) > 0.97
    place = np.empty(3000, int)
    place[order(3000, 1, 0)] = np.arange(3000)
    spread = [max(place[i] for i in row) - min(place[i] for i in row) for row in rows]
    # samples of a row were near each other in the shuffled order
    assert max(spread) < 2 * OPEN_ROWS * 2048 / lengths.mean()


def test_packing_of_very_many_samples_stays_linear() -> None:
    rows = pack(np.full(100_000, 100), 1000)
    assert len(rows) == 10_000
    assert rows[0] == list(range(10))


def test_too_long_for_a_row() -> None:
    with pytest.raises(DataError, match=r"sample 1 has 9 tokens, but a row holds 8; raise data\.seq_length"):
        pack([3, 9], 8)


def test_batches_keep_the_last_rows() -> None:
    assert batches([[0], [1], [2]], 2) == [[[0], [1]], [[2]]]


@given(dp=st.integers(1, 4), micro=st.integers(1, 3), times=st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_shares_join_to_the_batch(dp: int, micro: int, times: int) -> None:
    rows = [[i, -i] for i in range(dp * micro * times)]
    shares = [rank_micro_batches(rows, rank, dp, micro) for rank in range(dp)]
    assert all(len(s) == times and all(len(m) == micro for m in s) for s in shares)
    assert list(chain(*chain(*shares))) == rows


def test_shares_must_divide() -> None:
    with pytest.raises(
        LayoutError,
        match=r"6 rows cannot be dealt to 2 data-parallel ranks in micro-batches of 2; make batch\.total a multiple "
        r"of 4",
    ):
        rank_micro_batches([[0]] * 6, 0, 2, 2)


@given(lengths=LENGTHS, seed=st.integers(0, 9), total=st.integers(1, 9), packing=st.booleans(), shuffle=st.booleans())
@settings(deadline=None, max_examples=50)
def test_stream_is_the_epochs_one_after_another(
    lengths: list[int], seed: int, total: int, packing: bool, shuffle: bool
) -> None:
    def stream() -> Stream:
        return Stream(lengths, seed, 60, packing, shuffle, total)

    whole = stream()
    epochs = [pack(lengths, 60, packing=packing, order=order(len(lengths), seed, e, shuffle)) for e in range(3)]
    rows = list(chain(*epochs))
    steps = len(rows) // total
    assert [r for s in range(steps) for r in whole.batch(s)] == rows[: steps * total]
    for step in {0, steps // 2, max(0, steps - 1)}:
        assert stream().batch(step) == whole.batch(step)  # a fresh stream, as after resume, needs the step alone
        assert len(whole.batch(step)) == total


def test_epochs_differ_and_each_has_every_sample() -> None:
    stream = Stream([5] * 24, 7, 10, True, True, 4)
    epochs = [sorted(chain(*chain(*(stream.batch(s) for s in range(3 * e, 3 * e + 3))))) for e in range(3)]
    assert epochs == [list(range(24))] * 3
    assert stream.batch(0) != stream.batch(3) != stream.batch(6)


def test_steps_and_epochs() -> None:
    stream = Stream([5] * 10, 7, 5, True, True, 4)
    assert [stream.num_steps(e) for e in (0.1, 0.4, 0.5, 1, 1.5, 2, 4)] == [1, 1, 2, 3, 4, 5, 10]
    assert [stream.epoch_of(s) for s in (0, 1, 2, 3, 5)] == [0.0, 0.4, 0.8, 1.2, 2.0]


def test_a_batch_may_span_many_short_epochs() -> None:
    rows = Stream([1, 1], 0, 1, False, False, 7).batch(1)
    assert rows == [[1], [0], [1], [0], [1], [0], [1]]


def test_no_samples() -> None:
    with pytest.raises(DataError, match="no samples to make batches of"):
        Stream([], 0, 1, True, True, 1)


# windows for perplexity


def test_windows() -> None:
    parts = windows(range(20_000), 512, 8192)
    assert [len(p) for p in parts] == [512] * 16
    assert np.concatenate(parts).tolist() == list(range(8192))
    assert [p.tolist() for p in windows(range(6), 4)] == [[0, 1, 2, 3], [4, 5]]
    assert [p.tolist() for p in windows(range(5), 4)] == [[0, 1, 2, 3]]
    assert [p.tolist() for p in windows(range(3), 512, 100)] == [[0, 1, 2]]


@pytest.mark.parametrize(("n", "window", "tokens"), [(1, 4, None), (0, 4, None), (9, 4, 1), (9, 1, None)])
def test_windows_that_predict_nothing(n: int, window: int, tokens: int | None) -> None:
    with pytest.raises(DataError, match="at least 2 tokens"):
        windows(range(n), window, tokens)


@pytest.mark.parametrize("size", [2, 5, 8, 9, 23, 24])
@pytest.mark.parametrize(("window", "stride"), [(8, 1), (8, 3), (8, 7), (2, 1)])
def test_sliding_windows_predict_every_id_once_with_all_the_context_there_is(
    size: int, window: int, stride: int
) -> None:
    ids = np.arange(100, 100 + size)
    parts = sliding_windows(ids, window, stride)
    assert [int(part[p + 1]) for part, positions in parts for p in positions] == ids[1:].tolist()
    assert all(len(part) == min(window, size) for part, _ in parts)
    for _, positions in parts[1:]:
        assert len(positions) <= stride and positions[0] >= window - stride - 1
    assert [len(positions) for _, positions in parts[1:-1]] == [stride] * (len(parts) - 2)


def test_sliding_windows_of_part_of_a_text_or_of_none() -> None:
    ((part, positions),) = sliding_windows(range(9), 8, 4, tokens=3)
    assert part.tolist() == [0, 1, 2] and positions.tolist() == [0, 1]
    assert sliding_windows([1], 8, 4) == []
