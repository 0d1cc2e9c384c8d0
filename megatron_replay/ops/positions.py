"""The target positions that get a candidate set (arXiv 2510.09152, section 2): all, random, last or bucket.

`bucket` takes equally many from each bucket of confidence. Confidence is p(gold) under the base model. There are two
forms. `select_positions` sees all data at once. `BucketRule` decides sample by sample, from a hash of (seed, sample,
position), so that order, ranks and batches make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_replay.errors import ConfigError, DataError

STRATEGIES = ("all", "random", "last", "bucket")

Floats = npt.NDArray[np.floating[Any]]


def select_positions(
    confidence: Tensor | None,
    loss_mask: Tensor,
    strategy: str = "bucket",
    fraction: float = 0.5,
    buckets: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Flat positions [n] int64, ascending, of the chosen entries of `loss_mask`.

    - `all` takes every masked position, `last` the last of each row.
    - `random` takes round(fraction * masked) of them.
    - `bucket` takes as many, the same number from each of `buckets` equal-frequency buckets of confidence. Equal
      confidences are ordered by position, so buckets are equal in size whatever the ties.

    Args:
        confidence: like loss_mask, in [0, 1]; only `bucket` reads it.
        loss_mask: [..., T] bool; each row is a sample.
        generator: a CPU generator; the default one when None.

    Raises:
        ConfigError: an unknown strategy, or a fraction or number of buckets out of range.
        DataError: confidences missing, of another shape, or NaN.
    """
    _check_rule(strategy, fraction, buckets)
    mask = loss_mask.to("cpu", torch.bool)
    places = mask.flatten().nonzero()[:, 0]
    if strategy == "last":
        return _last(mask).to(loss_mask.device)
    if strategy == "random":
        places = places[_draw(places.shape[0], round(fraction * places.shape[0]), generator)]
    if strategy == "bucket":
        places = _from_buckets(_confidence(confidence, mask)[places], places, fraction, buckets, generator)
    return places.sort().values.to(loss_mask.device)


@dataclass(frozen=True)
class BucketRule:
    """Keep each target position with the rate of its confidence bucket.

    With the counts of a first pass every bucket gives the same number of positions, and all together `fraction` of
    them. A bucket too small for that is kept whole, and the others make up for it. Ties make buckets unequal, since a
    base model is certain (p = 1) of many tokens. The counts correct this.

    Without counts each bucket is kept at `fraction`. Without edges this is the rule `random`.
    """

    edges: tuple[float, ...]
    """Ascending inner edges; a confidence equal to an edge belongs to the bucket above it."""
    fraction: float
    seed: int
    counts: tuple[int, ...] | None = None
    """Positions in each of the len(edges) + 1 buckets, over all data."""

    def __post_init__(self) -> None:
        _check_rule("bucket", self.fraction, len(self.edges) + 1)
        if self.counts is not None and len(self.counts) != len(self.edges) + 1:
            raise ConfigError(
                f"{len(self.edges)} edges make {len(self.edges) + 1} buckets, but there are {len(self.counts)} counts"
            )

    @property
    def rates(self) -> tuple[float, ...]:
        """Chance of a position of each bucket to be kept."""
        if self.counts is None:
            return (self.fraction,) * (len(self.edges) + 1)
        left, rates = self.fraction * sum(self.counts), [0.0] * len(self.counts)
        filled = sorted((count, bucket) for bucket, count in enumerate(self.counts) if count)
        for done, (count, bucket) in enumerate(filled):
            quota = min(float(count), left / (len(filled) - done))
            rates[bucket] = quota / count
            left -= quota
        return tuple(rates)

    def keep(self, confidence: Any, loss_mask: Any, uid: bytes) -> Tensor:
        """Positions [n] int64, ascending, kept of one sample.

        confidence [T] (unread without edges), loss_mask [T] bool, uid 16 bytes.
        """
        places = np.flatnonzero(_numpy(loss_mask).astype(bool))
        bucket = np.zeros(places.shape, np.int64)
        if self.edges:
            bucket = bucket_of(_numpy(confidence)[places], self.edges)
        kept = position_uniform(self.seed, uid, places) < np.asarray(self.rates)[bucket]
        return torch.from_numpy(places[kept].astype(np.int64))


def bucket_edges(confidences: Any, buckets: int) -> tuple[float, ...]:
    """The buckets - 1 inner edges of equal-frequency buckets: quantiles in float64, rounded to float32.

    Raises DataError without data.
    """
    values = _checked(_numpy(confidences).reshape(-1))
    if not values.size:
        raise DataError("no confidences to cut into buckets; is the loss mask empty?")
    inner = np.quantile(values.astype(np.float64), np.arange(1, buckets) / buckets)
    return tuple(float(edge) for edge in inner.astype(np.float32))


def bucket_of(confidences: Any, edges: Sequence[float]) -> npt.NDArray[np.int64]:
    """[n] bucket of each confidence, compared as float32; one equal to an edge belongs above it."""
    values = _checked(_numpy(confidences).reshape(-1)).astype(np.float32)
    return np.searchsorted(np.asarray(edges, np.float32), values, side="right").astype(np.int64)


def bucket_counts(confidences: Any, edges: Sequence[float]) -> tuple[int, ...]:
    """Confidences in each bucket; counts of parts of the data add up."""
    return tuple(int(n) for n in np.bincount(bucket_of(confidences, edges), minlength=len(edges) + 1))


def position_uniform(seed: int, uid: bytes, positions: Any) -> npt.NDArray[np.float64]:
    """[n] float64 in [0, 1), a function of (seed, uid, position) only.

    It is the splitmix64 sequence of the sample, read at each position. Raises DataError when uid is not 16 bytes.
    """
    if len(uid) != 16:
        raise DataError(f"a sample uid is 16 bytes, got {len(uid)}")
    halves = np.frombuffer(uid, dtype="<u8")
    state = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    for half in halves:
        state = _mix(state ^ half)
    index = np.asarray(positions, np.int64).astype(np.uint64)
    bits = _mix(state + (index + np.uint64(1)) * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64; arithmetic is modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _last(mask: Tensor) -> Tensor:
    if not mask.numel():
        return torch.empty(0, dtype=torch.int64)
    rows = mask.reshape(-1, mask.shape[-1])
    steps = torch.arange(rows.shape[1]).expand_as(rows).masked_fill(~rows, -1)
    last = steps.amax(1)
    return (last + torch.arange(rows.shape[0]) * rows.shape[1])[last >= 0]


def _from_buckets(
    confidence: Tensor, places: Tensor, fraction: float, buckets: int, generator: torch.Generator | None
) -> Tensor:
    ranked = places[confidence.sort(stable=True).indices]
    total = round(fraction * places.shape[0])
    chosen = []
    for bucket, members in enumerate(ranked.tensor_split(buckets)):
        quota = total // buckets + (bucket < total % buckets)
        chosen.append(members[_draw(members.shape[0], quota, generator)])
    return torch.cat(chosen)


def _draw(count: int, wanted: int, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(count, generator=generator)[:wanted]


def _confidence(confidence: Tensor | None, mask: Tensor) -> Tensor:
    if confidence is None or confidence.shape != mask.shape:
        got = "none" if confidence is None else f"shape {tuple(confidence.shape)}"
        raise DataError(f"strategy 'bucket' needs confidences of the mask's shape {tuple(mask.shape)}, got {got}")
    flat = confidence.detach().to("cpu", torch.float64).flatten()
    _checked(flat[mask.flatten()].numpy())
    return flat


def _checked(values: Any) -> Floats:
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        raise DataError(f"a confidence is a probability in [0, 1], got {values[bad][0]}")
    return np.asarray(values)


def _numpy(values: Any) -> npt.NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _check_rule(strategy: str, fraction: float, buckets: int) -> None:
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown position strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is a share in (0, 1], got {fraction}")
    if buckets < 1:
        raise ConfigError(f"buckets must be at least 1, got {buckets}")
