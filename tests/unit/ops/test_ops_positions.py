"""Position selection: counts, balance between buckets, ties, and independence of order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_replay.errors import ConfigError, DataError
from megatron_replay.ops import BucketRule, bucket_counts, bucket_edges, position_uniform, select_positions

UID = bytes(range(16))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 40, t: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    g = seeded(7)
    return torch.rand(n, t, generator=g) ** 0.2, torch.rand(n, t, generator=g) < 0.7


def test_all_and_last() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    assert select_positions(None, mask, "all").tolist() == [1, 2, 8, 11]
    assert select_positions(None, mask, "last").tolist() == [2, 11]
    assert select_positions(None, mask[0], "last").tolist() == [2]


@pytest.mark.parametrize("strategy", ["all", "random", "last", "bucket"])
def test_nothing_masked_selects_nothing(strategy: str) -> None:
    for shape in ((0,), (6,), (0, 4), (3, 4)):
        assert select_positions(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), strategy).tolist() == []


@pytest.mark.parametrize("strategy", ["random", "bucket"])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_a_fraction_of_the_masked_is_drawn_without_repeats(strategy: str, fraction: float) -> None:
    confidence, mask = data()
    picked = select_positions(confidence, mask, strategy, fraction, generator=seeded())
    assert len(picked) == round(fraction * int(mask.sum())) == len(picked.unique())
    assert mask.flatten()[picked].all() and (picked.diff() > 0).all()
    again = select_positions(confidence, mask, strategy, fraction, generator=seeded())
    other = select_positions(confidence, mask, strategy, fraction, generator=seeded(1))
    assert torch.equal(picked, again) and (fraction == 1 or not torch.equal(picked, other))


@pytest.mark.parametrize("ties", [False, True])
def test_buckets_are_equally_represented(ties: bool) -> None:
    confidence, mask = data()
    if ties:
        confidence = confidence.round(decimals=1)
    picked = select_positions(confidence, mask, "bucket", 0.3, buckets=4, generator=seeded())
    members = confidence.flatten()[mask.flatten()]
    ranked = mask.flatten().nonzero()[:, 0][members.sort(stable=True).indices]
    shares = [int(torch.isin(part, picked).sum()) for part in ranked.tensor_split(4)]
    assert max(shares) - min(shares) <= 1


def test_a_bucket_rule_takes_the_same_from_each_bucket_whatever_the_ties() -> None:
    values = np.concatenate([np.full(30_000, 1.0), np.random.default_rng(0).random(30_000)]).astype(np.float32)
    edges = bucket_edges(values, 5)
    counts = bucket_counts(values, edges)
    assert (
        sum(counts) == 60_000 and list(edges) == sorted(edges) and edges == tuple(float(np.float32(e)) for e in edges)
    )
    assert bucket_counts(values[:100], edges) != counts
    parts = np.array([bucket_counts(p, edges) for p in np.array_split(values, 7)])
    assert tuple(parts.sum(0)) == counts
    rule = BucketRule(edges, 0.3, 1, counts)
    expected = [rate * count for rate, count in zip(rule.rates, counts, strict=True) if count]
    assert sum(expected) == pytest.approx(0.3 * 60_000)
    assert max(expected) - min(expected) < 1e-6
    kept = rule.keep(values, np.ones(60_000, bool), UID)
    shares = bucket_counts(values[kept.numpy()], edges)
    assert len(kept) == pytest.approx(18_000, rel=0.03)
    assert all(
        share == pytest.approx(want, rel=0.05) for share, want in zip([s for s in shares if s], expected, strict=True)
    )


def test_a_bucket_too_small_for_its_share_is_kept_whole() -> None:
    rule = BucketRule((0.2, 0.4, 0.4), 0.5, 0, (10, 90, 0, 100))
    assert rule.rates == pytest.approx((1.0, 45 / 90, 0.0, 45 / 100))
    assert BucketRule((0.5,), 0.5, 0).rates == (0.5, 0.5)
    assert BucketRule((), 1.0, 0, (0,)).rates == (0.0,)


def test_what_a_rule_keeps_depends_on_seed_sample_and_position_only() -> None:
    confidence, mask = (t.flatten() for t in data())
    rule = BucketRule(bucket_edges(confidence[mask], 5), 0.5, 3)
    kept = rule.keep(confidence, mask, UID)
    assert kept.dtype == torch.int64 and mask[kept].all() and (kept.diff() > 0).all()
    assert torch.equal(kept, rule.keep(confidence.double().numpy(), mask.numpy(), UID))
    short = rule.keep(confidence[:900], mask[:900], UID)
    assert torch.equal(short, kept[kept < 900])
    assert not torch.equal(kept, rule.keep(confidence, mask, bytes(16)))
    assert not torch.equal(kept, BucketRule(rule.edges, 0.5, 4).keep(confidence, mask, UID))
    everything = BucketRule((), 1.0, 0).keep(None, mask, UID)
    assert torch.equal(everything, mask.nonzero()[:, 0])


def test_a_confidence_on_an_edge_belongs_above_it() -> None:
    assert bucket_counts(np.array([0.25, 0.5, 0.75, 1.0]), (0.5, 1.0)) == (1, 2, 1)
    assert bucket_edges(np.array([0.0, 0.25, 0.5, 0.75, 1.0]), 4) == (0.25, 0.5, 0.75)


def test_position_uniform_is_uniform() -> None:
    places = np.arange(100_000)
    draws = [position_uniform(seed, uid, places) for seed in (0, 1, -1) for uid in (bytes(16), UID, UID[::-1])]
    for x in draws:
        assert x.min() >= 0 and x.max() < 1
        histogram = np.histogram(x, 50, (0, 1))[0]
        assert ((histogram - 2000) ** 2 / 2000).sum() < 100  # chi-square with 49 degrees: 85 is the 0.999 quantile
        assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 0.02
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.02
    uids = [i.to_bytes(16, "little") for i in range(20_000)]
    first = np.concatenate([position_uniform(0, uid, [3]) for uid in uids])
    assert ((np.histogram(first, 50, (0, 1))[0] - 400) ** 2 / 400).sum() < 100
    assert np.array_equal(position_uniform(5, UID, [70, 3]), position_uniform(5, UID, np.arange(100))[[70, 3]])


def test_the_hash_never_changes() -> None:
    """A store collected in two runs, or resumed by another version, must select the same positions."""
    assert position_uniform(42, UID, [0, 1, 1000]).tolist() == [
        0.8004162612886273,
        0.33331837550584353,
        0.9354985750707383,
    ]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"strategy": "bucketz"}, ConfigError, "bucketz"),
        ({"strategy": "random", "fraction": 0.0}, ConfigError, "fraction"),
        ({"buckets": 0}, ConfigError, "buckets"),
        ({"confidence": None}, DataError, "needs confidences"),
        ({"confidence": torch.full((2, 3), torch.nan)}, DataError, "nan"),
        ({"confidence": torch.full((2, 3), 1.5)}, DataError, "1.5"),
        ({"confidence": torch.zeros(3)}, DataError, "shape"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        select_positions(
            **{"confidence": torch.zeros(2, 3), "loss_mask": torch.ones(2, 3, dtype=torch.bool), **options}
        )  # type: ignore[arg-type]


def test_a_rule_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 edges make 3 buckets"):
        BucketRule((0.1, 0.2), 0.5, 0, (1, 2))
    with pytest.raises(DataError, match="16 bytes"):
        position_uniform(0, b"short", [0])
    with pytest.raises(DataError, match="no confidences"):
        bucket_edges(np.empty(0), 5)
