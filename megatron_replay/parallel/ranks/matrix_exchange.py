"""Whole matrices out of parts: gather each on one rank, compute there, and send every holder its part of the result.

A hidden matrix lies in parts. Tensor parallelism cuts it, and ZeRO-1 may cut each part again anywhere, or data-parallel
replicas hold it alike. Newton-Schulz needs it whole. So the matrices of a pipeline stage are dealt to the stage's ranks
by cost. Two all-to-alls a batch of matrices carry the parts there and the results back.

Each matrix is computed once in the world, by one rank, so the results are the same bits on every layout. Matrices that
megatron fuses (query, key and value; gate and up) are taken apart first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_replay.models.weights import Weight, merge, shard, split, unshard
from megatron_replay.parallel.ranks.world import World

BATCH = 1 << 25
"""Elements a rank works on at a time, about: with the copies in flight some 400 MB of float32."""


@dataclass(frozen=True)
class Part:
    """A rank's part of a logical tensor: elements [start, stop) of its tensor-parallel part, flat."""

    row: int
    tensor_rank: int
    start: int
    stop: int
    counted: bool
    """False for a copy of what another rank holds."""


class Exchange:
    """The plan for one model on one layout, the same on every rank of a pipeline stage; collective to make."""

    def __init__(
        self,
        world: World,
        table: Sequence[Weight],
        parts: Mapping[Tensor, Part],
        dtype: torch.dtype,
        *,
        into: Sequence[Weight] | None = None,
    ) -> None:
        """into: the table by which the results are laid out, where that is not the `table` of the values."""
        self._world, self._table, self._dtype = world, table, dtype
        self._into = into or table
        self._mine = dict(parts)
        held: list[list[Part]] = world.gather_stage_objects(list(parts.values()))
        self._held = [{part.row: part for part in parts} for parts in held]
        self._batches = deal({row: table[row] for parts in self._held for row in parts}, len(held))

    def each_whole(
        self,
        params: Sequence[Tensor],
        values: Callable[[int], Tensor],
        function: Callable[[Tensor], Tensor],
        stacked: int,
    ) -> Iterator[tuple[int, Tensor]]:
        """See `optim.Shards.each_whole`; every parameter must be among the parts this was made with."""
        index = {self._mine[param].row: i for i, param in enumerate(params)}
        for owners in self._batches:
            rows = sorted(owners)
            sent: list[list[Tensor]] = [[] for _ in self._held]
            for row in rows:
                if row in index:
                    stack = values(index[row]).reshape(stacked, -1)
                    if self._mine[params[index[row]]].counted:
                        sent[owners[row]].append(stack)
            there = self._swap(sent, self._arriving(rows, owners, stacked))
            back: list[list[Tensor]] = [[] for _ in self._held]
            for row in rows:
                if owners[row] == self._world.stage_rank:
                    parts = {
                        rank: next(there[rank])
                        for rank, held in enumerate(self._held)
                        if row in held and held[row].counted
                    }
                    for rank, piece in self._compute(row, parts, function, stacked):
                        back[rank].append(piece)
            here = self._swap(back, self._returning(rows, owners, stacked))
            for row in rows:
                if row in index:
                    i = index[row]
                    yield i, next(here[owners[row]]).view(stacked, *params[i].shape)

    def _compute(
        self, row: int, parts: Mapping[int, Tensor], function: Callable[[Tensor], Tensor], stacked: int
    ) -> Iterator[tuple[int, Tensor]]:
        weight, size = self._table[row], self._world.tensor_size
        shape = shard(torch.empty(weight.shape, device="meta"), weight.axis, 0, size).shape
        local = [
            torch.empty(stacked, math.prod(shape), dtype=self._dtype, device=self._world.torch_device)
            for _ in range(size)
        ]
        for rank, piece in parts.items():
            part = self._held[rank][row]
            local[part.tensor_rank][:, part.start : part.stop] = piece
        layers = [split(weight, unshard([x[k].view(shape) for x in local], weight.axis)) for k in range(stacked)]
        results = {name: function(torch.stack([layer[name] for layer in layers])) for name in weight.hf}
        whole = [merge(self._into[row], {name: result[k] for name, result in results.items()}) for k in range(stacked)]
        for tensor_rank in range(size):
            flat = torch.stack([shard(w, weight.axis, tensor_rank, size).reshape(-1) for w in whole])
            for rank, held in enumerate(self._held):
                if row in held and held[row].tensor_rank == tensor_rank:
                    yield rank, flat[:, held[row].start : held[row].stop]

    def _arriving(self, rows: Sequence[int], owners: Mapping[int, int], stacked: int) -> list[list[tuple[int, int]]]:
        """Shapes of the tensors that each rank sends here for the rows this rank owns, in row order."""
        own = [row for row in rows if owners[row] == self._world.stage_rank]
        return [
            [(stacked, _length(held[row])) for row in own if row in held and held[row].counted] for held in self._held
        ]

    def _returning(self, rows: Sequence[int], owners: Mapping[int, int], stacked: int) -> list[list[tuple[int, int]]]:
        mine = self._held[self._world.stage_rank]
        shapes: list[list[tuple[int, int]]] = [[] for _ in self._held]
        for row in rows:
            if row in mine:
                shapes[owners[row]].append((stacked, _length(mine[row])))
        return shapes

    def _swap(self, sent: list[list[Tensor]], shapes: list[list[tuple[int, int]]]) -> list[Iterator[Tensor]]:
        empty = torch.empty(0, dtype=self._dtype, device=self._world.torch_device)
        flat = [torch.cat([t.to(self._dtype).reshape(-1) for t in tensors]) if tensors else empty for tensors in sent]
        received = self._world.swap(flat, [sum(math.prod(shape) for shape in of) for of in shapes])
        return [iter(_cut(buffer, of)) for buffer, of in zip(received, shapes, strict=True)]


def deal(rows: Mapping[int, Weight], ranks: int) -> list[dict[int, int]]:
    """Batches of rows, each row with the rank that computes it.

    Neighbours come together. The dearest row goes first, to the rank that has least to do.
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(rows):
        size = math.prod(rows[row].shape)
        if not batches or room < size:
            batches.append([])
            room = BATCH * ranks
        batches[-1].append(row)
        room -= size
    plan = []
    for batch in batches:
        load, owners = [0] * ranks, {}
        for row in sorted(batch, key=lambda row: (-_cost(rows[row]), row)):
            owners[row] = load.index(min(load))
            load[owners[row]] += _cost(rows[row])
        plan.append(owners)
    return plan


def _cost(weight: Weight) -> int:
    """Multiplications of a Newton-Schulz step, about."""
    return sum(rows * cols * min(rows, cols) for rows, cols in weight.hf_shapes)


def _length(part: Part) -> int:
    return part.stop - part.start


def _cut(buffer: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    pieces = torch.split(buffer, [math.prod(shape) for shape in shapes]) if shapes else ()
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
