"""The part of candidate sets that one vocabulary shard holds, by position and by column (N positions, m ids here)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_replay.kernels.torch_twins import row_of


@dataclass(frozen=True, eq=False)
class ByColumn:
    """The entries of a `LocalSets` by column, for the gradient of the weight (U columns that occur)."""

    touched: Tensor
    """[U] int32: the columns, ascending."""
    begins: Tensor
    """[U+1] int32: column touched[u] has the entries begins[u]:begins[u+1] of `tokens` and `order`."""
    tokens: Tensor
    """[m] int32: the position that each entry belongs to, ascending within a column."""
    order: Tensor
    """[m] int32: the index of each entry in the sets."""

    @classmethod
    def of(cls, offsets: Tensor, columns: Tensor) -> ByColumn:
        """The entries of a table of N sets by column: offsets [N+1] int64 and columns [m] int32.

        An accelerator is waited for, because U depends on the columns.
        """
        ordered, order = columns.sort(stable=True)
        touched, counts = torch.unique_consecutive(ordered, return_counts=True)
        begins = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tokens = row_of(offsets, columns.shape[0])[order]
        return cls(touched, begins.to(torch.int32), tokens.to(torch.int32), order.to(torch.int32))

    def entries(self, coefficient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(touched, begins, tokens, coefficient) as the operators of the weight's gradient take them.

        The coefficient [m] of each entry of the sets is put into the order of the columns.
        """
        return self.touched, self.begins, self.tokens, coefficient.index_select(0, self.order)

    def to(self, device: torch.device | str) -> ByColumn:
        return ByColumn(*(t.to(device) for t in (self.touched, self.begins, self.tokens, self.order)))


@dataclass(frozen=True, eq=False)
class LocalSets:
    """The part of candidate sets that one vocabulary shard holds, as the kernels take it (m ids of this shard)."""

    offsets: Tensor
    """[N+1] int64: position t owns columns[offsets[t]:offsets[t+1]]."""
    columns: Tensor
    """[m] int32: row of this rank's weight."""
    gold: Tensor
    """[N] int64: the index of the gold id in `columns`, -1 when another rank holds it."""
    by_column: ByColumn | None = None
    """The same by column, where it was made beforehand."""
    targets: Tensor | None = None
    """[m] y >= 0, whose sum over all shards is 1 at each position; None: 1 at the gold id, 0 elsewhere."""
    weights: Tensor | None = None
    """[N] w >= 0: factors of the positions' losses, the same on every shard; None: 1 each."""

    @property
    def num_positions(self) -> int:
        return self.offsets.shape[0] - 1

    def indexed(self) -> LocalSets:
        """The same sets with `by_column`."""
        return self if self.by_column else replace(self, by_column=ByColumn.of(self.offsets, self.columns))

    def to(self, device: torch.device | str) -> LocalSets:
        held = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: value.to(device) for name, value in held if value is not None})
