"""The whole model in one optimizer, and cut over pipeline, tensor and data ranks: the same bits.

Ranks are threads that meet at a barrier. The model has an embedding tied to the output (held by both pipeline stages),
and a norm weight and two matrices a layer. The tensor ranks split everything but the norm weights. The data ranks
(ZeRO-1) cut the flat buffer of what a tensor rank holds anywhere.

Float32 weights come out bit for bit the same since the sums are float64. The order of adding changes them by 1e-16. The
float32 update would only notice that if a scalar lay that close to a rounding edge.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import BY_MATRIX, Case, further, registered
from torch import Tensor

from megatron_replay.optim import AdamW, Kind, MoClip, Placement, ReplayOptimizer

SIZES = {"embedding": 600, "norm0": 30, "qkv0": 200, "fc0": 500, "norm1": 30, "qkv1": 200, "fc1": 500}
NAMES = list(SIZES)
LAYERS = [-1, 0, 0, 0, 1, 1, 1]
KINDS: list[Kind] = ["embedding", "vector", "attention", "matrix", "vector", "attention", "matrix"]
STAGES = [["embedding", "norm0", "qkv0", "fc0"], ["norm1", "qkv1", "fc1", "embedding"]]
NUM_TENSOR, NUM_STEPS = 2, 4
Make = Callable[..., ReplayOptimizer]


@dataclass
class Meeting:
    """The meeting point of the ranks' tables, which are added in rank order."""

    num_ranks: int

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.num_ranks)
        self.tables: dict[int, Tensor] = {}

    def sum(self, rank: int, table: Tensor, members: Sequence[int]) -> Tensor:
        self.tables[rank] = table
        self.barrier.wait(timeout=20)
        total = torch.zeros_like(table)
        for member in members:
            total += self.tables[member]
        self.barrier.wait(timeout=20)
        return total


@dataclass
class Rank:
    """One rank's pieces; `counted` and `members` are what the mutations below get wrong."""

    meeting: Meeting
    index: int
    stage: int
    tensor: int
    pieces: list[tuple[str, slice]]
    mutation: str = ""
    poisoned_cut: int = 0
    num_cuts: int = 0

    def counted(self, name: str) -> bool:
        replica = name.startswith("norm") and self.tensor > 0 and self.mutation != "replicas counted twice"
        tied = name == "embedding" and self.stage > 0 and self.mutation != "tied copy counted twice"
        return not (replica or tied)

    def place(self, params: Sequence[Tensor]) -> Placement:
        names = [name for name, _ in self.pieces]
        rows = [NAMES.index(n) for n in names]
        return Placement(rows=rows, counted=[self.counted(n) for n in names], layers=LAYERS, kinds=KINDS)

    def sum(self, table: Tensor) -> Tensor:
        everyone = range(self.meeting.num_ranks)
        half = self.meeting.num_ranks // 2
        members = {
            "norms of one shard": [self.index],
            "stages forgotten": [r for r in everyone if r // half == self.stage],
            "tensor rank forgotten": [r for r in everyone if r % half // (half // NUM_TENSOR) == self.tensor],
        }.get(self.mutation, everyone)
        return self.meeting.sum(self.index, table, members)

    def cut(self, whole: dict[str, Tensor]) -> list[Tensor]:
        self.num_cuts += 1
        pieces = [whole[name][piece].clone() for name, piece in self.pieces]
        if self.num_cuts == self.poisoned_cut:
            pieces[0][-1] = torch.nan
        return pieces


def layout(cuts: Sequence[Sequence[int]], mutation: str = "") -> list[Rank]:
    """Ranks (stage, tensor, data), one flat buffer a (stage, tensor), cut at these places."""
    meeting = Meeting(2 * NUM_TENSOR * (len(cuts[0]) + 1))
    ranks: list[Rank] = []
    for stage, names in enumerate(STAGES):
        for tensor in range(NUM_TENSOR):
            spans = [
                (n, 0, SIZES[n]) if n.startswith("norm") else (n, tensor * SIZES[n] // 2, (tensor + 1) * SIZES[n] // 2)
                for n in names
            ]
            total = sum(stop - start for _, start, stop in spans)
            edges = [0, *sorted(c % total for c in cuts[stage * NUM_TENSOR + tensor]), total]
            for low, high in pairwise(edges):
                pieces, offset = [], 0
                for name, start, stop in spans:
                    first, last = max(low, offset), min(high, offset + stop - start)
                    if first < last:
                        pieces.append((name, slice(start + first - offset, start + last - offset)))
                    offset += stop - start
                ranks.append(Rank(meeting, len(ranks), stage, tensor, pieces, mutation))
    return ranks


def vectors(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {n: torch.randn(size, generator=gen).to(dtype) * (1 + len(n)) for n, size in SIZES.items()}


def run(opt: ReplayOptimizer, pick: Callable[[dict[str, Tensor]], list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    params: list[Tensor] = opt.param_groups[0]["params"]
    for step in range(NUM_STEPS):
        for p, g in zip(params, pick(vectors(step, dtype)), strict=True):
            p.grad = g
        opt.step()
    return [p.detach() for p in params]


def whole_run(make: Make, dtype: torch.dtype) -> tuple[dict[str, Tensor], ReplayOptimizer]:
    class Whole:
        def place(self, params: Sequence[Tensor]) -> Placement:
            return Placement(rows=range(len(NAMES)), counted=[True] * len(NAMES), layers=LAYERS, kinds=KINDS)

        def sum(self, table: Tensor) -> Tensor:
            return table

    opt = make([torch.nn.Parameter(v) for v in vectors(99, dtype).values()], shards=Whole())
    return dict(zip(NAMES, run(opt, lambda whole: list(whole.values()), dtype), strict=True)), opt


def sharded_run(make: Make, ranks: list[Rank], dtype: torch.dtype) -> tuple[list[list[Tensor]], list[ReplayOptimizer]]:
    opts = []
    for rank in ranks:
        opt = make([{"params": []}])
        opt.param_groups[0]["params"] = [torch.nn.Parameter(v) for v in rank.cut(vectors(99, dtype))]
        opt.remember_base()
        opt.attach(rank)
        opts.append(opt)
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(run, opt, rank.cut, dtype) for opt, rank in zip(opts, ranks, strict=True)]
        return [f.result() for f in futures], opts


def equal(whole: dict[str, Tensor], ranks: list[Rank], parts: list[list[Tensor]]) -> bool:
    return all(
        torch.equal(a, b)
        for rank, part in zip(ranks, parts, strict=True)
        for a, b in zip(rank.cut(whole), part, strict=True)
    )


CUTS = [[150, 700], [299, 301], [1, 360], [364, 365]]
MAKES = {
    **registered(lr=0.01, without=BY_MATRIX),
    **further(lr=0.01),
    **{
        f"moclip-{scope}-{obtuse}": Case(name="moclip", lr=0.01, options={"scope": scope, "obtuse": obtuse})
        for scope in ("global", "layer", "tensor")
        for obtuse in ("signed", "restart", "project")
    },
    "moclip-clipped": Case(name="moclip", lr=0.01, clip_grad=0.0, options={"v_source": "clipped"}),
    "tam-tensor": Case(name="tam", lr=0.01, options={"scope": "tensor"}),
    "tam-unclipped": Case(name="tam", lr=0.01, clip_grad=0.0, options={"scope": "layer"}),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
def test_sharded_equals_whole_bit_for_bit(make: Make) -> None:
    whole, single = whole_run(make, torch.float32)
    ranks = layout(CUTS)
    parts, opts = sharded_run(make, ranks, torch.float32)
    assert equal(whole, ranks, parts)
    assert len({opt.grad_norm for opt in opts}) == 1 and opts[0].grad_norm == pytest.approx(single.grad_norm, rel=1e-14)
    assert all(opt.metrics == opts[0].metrics for opt in opts)
    assert opts[0].metrics == pytest.approx(single.metrics, rel=1e-12)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 10_000), min_size=1, max_size=1), min_size=4, max_size=4),
    st.sampled_from(["global", "layer", "tensor"]),
)
def test_cuts_anywhere(cuts: list[list[int]], scope: str) -> None:
    make = partial(MoClip, lr=0.01, scope=scope)
    whole, _ = whole_run(make, torch.float32)
    ranks = layout(cuts)
    assert equal(whole, ranks, sharded_run(make, ranks, torch.float32)[0])


def test_float64_weights_agree_to_rounding() -> None:
    """Here the last bits of the sums reach the weights: not the same bits, but within a few units in the last place."""
    make = partial(MoClip, lr=0.01)
    whole, _ = whole_run(make, torch.float64)
    ranks = layout(CUTS)
    for rank, part in zip(ranks, sharded_run(make, ranks, torch.float64)[0], strict=True):
        for a, b in zip(rank.cut(whole), part, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_a_rank_whose_gradient_is_not_finite_stops_all() -> None:
    ranks = layout(CUTS)
    ranks[2].poisoned_cut = 2  # the first is of the weights, the next of the first gradient
    _, opts = sharded_run(MAKES["moclip-global-signed"], ranks, torch.float32)
    assert all(opt.skipped == 1 and opt.param_groups[0]["step"] == NUM_STEPS - 1 for opt in opts)


class CautiousAdamW(AdamW):
    """Cautious AdamW (arXiv 2411.16085, without its factor): a coordinate stays where step and gradient disagree."""

    def filter(self, direction: Tensor, exp_avg: Tensor, grad: Tensor, row: int) -> None:
        direction.mul_(direction * grad > 0)


def test_a_filter_that_compares_with_the_gradient_is_the_method_written_out() -> None:
    params = [torch.nn.Parameter(v) for v in vectors(99, torch.float64).values()]
    found = run(CautiousAdamW(params, 0.01), lambda whole: list(whole.values()), torch.float64)
    held = 0
    for name, theta in vectors(99, torch.float64).items():
        m, v = torch.zeros_like(theta), torch.zeros_like(theta)
        for t in range(1, NUM_STEPS + 1):
            g = vectors(t - 1, torch.float64)[name]
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            u = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            held += int((u * g <= 0).sum())
            theta = theta * (1 - 0.01 * 0.1) - 0.01 * u.where(u * g > 0, torch.zeros_like(u))
        torch.testing.assert_close(found[NAMES.index(name)], theta, rtol=1e-12, atol=1e-12)
    assert held > 0.1 * NUM_STEPS * sum(SIZES.values()), "the mask has something to do"


def test_a_filter_that_compares_with_the_gradient_does_not_see_the_cuts() -> None:
    make = partial(CautiousAdamW, lr=0.01, clip_grad=1.0)
    whole, _ = whole_run(make, torch.float32)
    ranks = layout(CUTS)
    assert equal(whole, ranks, sharded_run(make, ranks, torch.float32)[0])
    assert not equal(
        whole_run(partial(AdamW, lr=0.01, clip_grad=1.0), torch.float32)[0], ranks, [r.cut(whole) for r in ranks]
    )


MUTATIONS = [
    "replicas counted twice",
    "tied copy counted twice",
    "norms of one shard",
    "stages forgotten",
    "tensor rank forgotten",
]


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize(
    "make", [partial(MoClip, lr=0.01), partial(AdamW, lr=0.01, eps=1e-2, clip_grad=1.0)], ids=["angle", "norm"]
)
def test_wrong_sharding_is_noticed_at_global_scope(make: Make, mutation: str) -> None:
    whole, _ = whole_run(make, torch.float32)
    ranks = layout(CUTS, mutation)
    assert not equal(whole, ranks, sharded_run(make, ranks, torch.float32)[0])


def test_double_counting_is_invisible_at_tensor_scope() -> None:
    """Why the mutations are tried at global scope: the cosine of a single tensor does not see a factor two."""
    make = partial(MoClip, lr=0.01, scope="tensor")
    whole, _ = whole_run(make, torch.float32)
    ranks = layout(CUTS, "replicas counted twice")
    assert equal(whole, ranks, sharded_run(make, ranks, torch.float32)[0])
