"""Micro-batches: samples laid in one flat row of tokens, and the positions of them whose loss counts.

T tokens in the flat row, N positions that count. T is the same for every micro-batch of a step, so that pipeline stages
know what they receive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from megatron_replay.data.prefixes import Tree, lay
from megatron_replay.data.samples import Sample
from megatron_replay.ops import LocalSets

DOMAIN = "domain"
"""The name of the positions that a run is to learn."""


@dataclass(frozen=True, eq=False)
class Term:
    """Positions of a micro-batch that have a loss of their own: a part of one summand of the step's loss."""

    name: str
    """DOMAIN, or the name under which the log shows the summand's mean."""
    rows: slice = field(default_factory=lambda: slice(None))
    """The positions, of the N."""
    scale: float = 1.0
    """Factor of their losses."""
    sets: LocalSets | None = None
    """Their candidate sets, as this rank's loss takes them; None where it takes none."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    tokens: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64: each token's position within its sample."""
    segments: Tensor
    """[n, 3] int64 on the cpu: start, length and parent, see `data.prefixes`.

    Without shared prefixes there is a row for each sample.
    """
    rows: Tensor
    """[N] int64 on the cpu: the flat positions whose hidden state goes to the head, sample by sample.

    A position in a shared prefix is there once for each of the prefix's samples.
    """
    gold: Tensor
    """[N] int64: the token that follows each of these positions."""
    positions: Sequence[np.ndarray] = ()
    """For each sample, the positions within it that are its part of `rows`."""
    shared: int = 0
    """Tokens saved by shared prefixes."""
    samples: Sequence[Sample] = ()
    """The samples themselves, whole and in order, where they come from data."""
    sets: LocalSets | None = None
    """Candidate sets of the N positions, as this rank's loss takes them; None where it takes none."""
    terms: tuple[Term, ...] = ()
    """The parts of the positions, in order, where they have different losses; their sets are then here."""

    def parts(self) -> tuple[Term, ...]:
        """The terms; without them all positions are the domain's."""
        return self.terms or (Term(DOMAIN, sets=self.sets),)

    def part(self, term: Term) -> MicroBatch:
        """The micro-batch as the loss of a term sees it: with the term's positions only."""
        return replace(self, rows=self.rows[term.rows], gold=self.gold[term.rows], sets=term.sets, terms=())


Task = Callable[[MicroBatch, Tensor, Tensor], Tensor]
"""A computation at the output layer, called as task(batch, hidden [N, H], weight [V_local, H]).

It returns a value or more a position, [N, ...].
"""


def flatten(
    samples: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    length: int,
    device: torch.device,
    tree: Tree | None = None,
    further: Sequence[np.ndarray] = (),
) -> MicroBatch:
    """Lay token id sequences in a row of `length`, as `tree` says (default: one after the other).

    positions[i]: the positions of sample i whose next token is predicted. further[i]: more of them, which come behind
    those of all samples.
    """
    tree = lay(samples, share_prefixes=False) if tree is None else tree
    tokens = np.zeros(length, dtype=np.int64)
    position_ids = np.zeros(length, dtype=np.int64)
    tokens[: len(tree)] = tree.tokens
    position_ids[: len(tree)] = tree.position_ids
    rows, gold = [], []
    for some in (positions, further) if further else (positions,):
        for ids, chosen, where in zip(samples, some, tree.where, strict=True):
            rows.append(where[np.asarray(chosen, dtype=np.int64)])
            gold.append(np.asarray(ids, dtype=np.int64)[np.asarray(chosen, dtype=np.int64) + 1])
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None].to(device),
        position_ids=torch.from_numpy(position_ids)[None].to(device),
        segments=torch.from_numpy(tree.segments),
        rows=torch.from_numpy(_joined(rows)),
        gold=torch.from_numpy(_joined(gold)).to(device),
        positions=positions,
        shared=sum(map(len, tree.where)) - len(tree),
    )


def micro_batches(
    samples: Sequence[Sequence[np.ndarray]],
    positions: Sequence[Sequence[np.ndarray]],
    device: torch.device,
    *,
    multiple: int,
    share_prefixes: bool,
    further: Sequence[Sequence[np.ndarray]] = (),
) -> list[MicroBatch]:
    """The micro-batches of a step, all of one length that `multiple` divides.

    samples[m], positions[m]: token ids and chosen positions of the samples of micro-batch m. share_prefixes: lay
    samples that begin alike as a tree. A sample ends at its last position, as nothing that counts depends on the rest.
    further[m]: positions as `flatten` takes them, in front of a sample's last one.
    """
    needed = [[cut(ids, at) for ids, at in zip(*pair, strict=True)] for pair in zip(samples, positions, strict=True)]
    trees = [lay(some, share_prefixes=share_prefixes) for some in needed]
    length = row_length([len(tree) for tree in trees], multiple)
    more = further or [()] * len(trees)
    laid = zip(samples, positions, trees, more, strict=True)
    return [flatten(whole, at, length, device, tree, behind) for whole, at, tree, behind in laid]


def cut(ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The tokens on which the predictions after `positions` depend."""
    return ids[: int(positions.max(initial=-1)) + 1]


def row_length(lengths: Sequence[int], multiple: int) -> int:
    """The longest of some flat rows, at least 1, rounded up so that sequence parallelism divides it."""
    return -(-max(1, *lengths) // multiple) * multiple


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
