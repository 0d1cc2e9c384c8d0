"""Candidate sets as every layer knows them: the rule that makes one, and the record that holds many.

Neither numpy nor torch is needed here: the store fills the record with arrays of the one, `ops` with the other's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_replay.errors import ConfigError
from megatron_replay.ragged import A, Ragged, per_entry, per_position


@dataclass(frozen=True, kw_only=True)
class CandidateRule:
    """This decides how large a candidate set is (paper section 2). Raises ConfigError for a rule that cannot be."""

    tau: float = 0.95
    """Keep the fewest tokens whose probabilities add up to this."""
    k_max: int = 200
    """Never keep more than this many, the gold token aside."""
    min_set_size: int = 2
    """Keep at least this many: a set of one has no gradient. 1 is the paper's literal rule."""
    always: tuple[int, ...] = ()
    """Ids that are in every set, beside the gold one."""

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ConfigError(f"tau is a probability mass in (0, 1], got {self.tau}")
        if self.k_max < 1:
            raise ConfigError(f"k_max must be at least 1, got {self.k_max}")
        if not 1 <= self.min_set_size <= self.k_max:
            raise ConfigError(f"min_set_size must lie in 1..k_max ({self.k_max}), got {self.min_set_size}")


@dataclass(frozen=True, eq=False)
class SetRecord(Ragged[A]):
    """The candidate sets of N positions, nnz ids in all; a new column is one field here.

    The store's table of columns (`store.columns`) says which fields are stored, and how.
    """

    ids: A = field(metadata=per_entry("int32"))
    """[nnz] int32, ascending within a position."""
    gold_slot: A = field(metadata=per_position("int32"))
    """[N] int32: index of the gold id within the position's set."""
    logits: A | None = field(metadata=per_entry("float32"))
    """[nnz] float32: the base model's logits of the ids, where they were kept."""
    lse: A = field(metadata=per_position("float32"))
    """[N] float32: log-sum-exp of the base model over the real vocabulary."""
    outside_mass: A = field(metadata=per_position("float32"))
    """[N] float32 in [0, 1]: rho, the base model's probability outside the set."""

    def gold(self) -> A:
        """[N]: the gold ids."""
        gold: A = self.ids[self.offsets[:-1] + self.gold_slot]
        return gold
