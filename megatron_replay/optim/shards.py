"""The seam between an optimizer and the ranks: who holds which part of which tensor, and one sum over all of them.

An optimizer sees the parameters (or parts of parameters) of its own rank. All it needs of the others is a few numbers a
tensor (see `stats.COLUMNS`). So it fills a table with one row for every logical tensor of the *whole model*, over all
pipeline stages. It asks `Shards.sum` to add the tables of all ranks. Each rank derives the gradient norm and the groups
of every scope (tensor, layer, global) from the summed table alone. That is one collective a step, of a few numbers a
row, for every layout.

Example: tensor-parallel rank 1 of 2, ZeRO-1 over 2 data ranks, a model of one embedding (split), one norm weight
(replicated) and one matrix (split). This rank's shard of the flat buffer covers the end of the embedding and the whole
norm weight:

    place([embedding_part, norm]) == Placement(
        rows=[0, 1], counted=[True, False], layers=[-1, 0, 0], kinds=["embedding", "vector", "matrix"]
    )

Row 0 is the embedding: every rank that holds another part of it adds to the same row. Row 1 is the norm weight, held by
both tensor ranks. Rank 0 has `counted=True` and adds its sums; rank 1 adds nothing; both read the row. Row 2 is the
matrix, none of which lies here: its row arrives by the sum. A tied embedding on the last pipeline stage has the row of
the one on the first, and `counted=False`.

Optimizers that need whole matrices (Newton-Schulz) give `Shards.each_whole` a function of a whole matrix and get back
their own parts of its results. The implementer decides which rank gathers and computes each matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

Kind = Literal["matrix", "attention", "embedding", "vector"]
"""The kind of a logical tensor: a hidden matrix, an attention projection, an embedding or head, or 1-D.

An attention projection is a hidden matrix too.
"""


@dataclass(frozen=True)
class Placement:
    """The rows of one rank's parameters in the table of the whole model."""

    rows: Sequence[int]
    """Row of each parameter asked about, in that order; parts of one logical tensor have the same row."""
    counted: Sequence[bool]
    """True where a parameter adds to its row; of the holders of a replicated or tied tensor one does."""
    layers: Sequence[int]
    """Layer of each row of the table, the same on every rank.

    Its length is the number of logical tensors of the whole model.
    """
    kinds: Sequence[Kind]
    """Kind of each row of the table; a shard of a matrix may be flat, so its own shape does not show it."""


class Shards(Protocol):
    """All that an optimizer knows of sharding; `LOCAL` is the whole model in one process."""

    def place(self, params: Sequence[Tensor]) -> Placement:
        """Find these parameters (the optimizer's own, in its order) in the table.

        It is asked before every step, so it must be cheap.
        """
        ...

    def sum(self, table: Tensor) -> Tensor:
        """Add [rows, C] float64 tables over every rank that holds a part of the model.

        The result must be the same bits on every rank. Every rank calls it equally often a step (once, but for
        optimizers that say so), also when it holds no parameter. Where no all-reduce of float64 exists, gather the
        tables and add them in rank order. The table lies on the cpu; the result may lie anywhere.
        """
        ...

    def each_whole(
        self,
        params: Sequence[Tensor],
        values: Callable[[int], Tensor],
        function: Callable[[Tensor], Tensor],
        stacked: int = 1,
    ) -> Iterator[tuple[int, Tensor]]:
        """Apply `function` to elementwise values of whole matrices, and give each rank its parts of the results.

        values(i) is [stacked, *params[i].shape], asked for once, when its turn comes. `function` maps the whole
        matrix's values [stacked, rows, cols] to as many, and is called for each matrix once in the world. Yields (i,
        [stacked, *params[i].shape]) for every parameter, in any order. Every rank of a pipeline stage must run it to
        the end, with the same matrices among its parameters.
        """
        ...


class _Local:
    """Every parameter is a whole tensor with a row of its own, all of one layer."""

    def place(self, params: Sequence[Tensor]) -> Placement:
        count = len(params)
        return Placement(
            rows=range(count), counted=[True] * count, layers=[0] * count, kinds=[kind_of(p) for p in params]
        )

    def sum(self, table: Tensor) -> Tensor:
        return table

    def each_whole(
        self,
        params: Sequence[Tensor],
        values: Callable[[int], Tensor],
        function: Callable[[Tensor], Tensor],
        stacked: int = 1,
    ) -> Iterator[tuple[int, Tensor]]:
        for i in range(len(params)):
            yield i, function(values(i))


def kind_of(param: Tensor) -> Kind:
    """The kind of a whole tensor by its shape.

    An embedding looks like a matrix; a parameter group's `kind` says otherwise.
    """
    return "matrix" if param.ndim == 2 else "vector"


LOCAL: Shards = _Local()
"""The default of every optimizer: nobody else holds anything."""
