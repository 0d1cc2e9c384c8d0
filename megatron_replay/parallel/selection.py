"""The tasks of Stage 0: the confidence of every target position, and the candidate sets of the chosen ones.

Logits exist for a chunk of rows at a time. N target positions of a micro-batch, n of them chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_replay.candidates import CandidateRule
from megatron_replay.ops import CandidateSets, linear_dynamic_topk, target_logprobs
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.mcore.model import Model, vocab_shard

Chooser = Callable[[MicroBatch, np.ndarray], np.ndarray]
"""(batch, confidence [N]) -> chosen [N] bool."""


class Confidence:
    """The task p(gold) of every position of the batch, [N] in [0, 1]."""

    def __init__(self, model: Model, *, vocab_size: int, chunk_rows: int) -> None:
        """vocab_size: ids from there on are padding. chunk_rows: logits exist for this many positions at a time."""
        self.shard, self.vocab_size, self.chunk_rows = vocab_shard(model), vocab_size, chunk_rows

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        logp = target_logprobs(
            hidden, weight, batch.gold, self.shard, vocab_size=self.vocab_size, chunk_rows=self.chunk_rows
        )
        return logp.exp().clamp(max=1.0).cpu()


class Selection:
    """The task that finds the candidate sets of each micro-batch, and keeps them until they are taken."""

    def __init__(
        self,
        model: Model,
        rule: CandidateRule,
        *,
        vocab_size: int,
        chunk_rows: int,
        choose: Chooser | None = None,
        kernels: str = "auto",
    ) -> None:
        """choose: decides from the confidence which positions get a set; None: all. The others: see `Confidence`."""
        self.rule, self.choose, self.kernels = rule, choose, kernels
        self.confidence = Confidence(model, vocab_size=vocab_size, chunk_rows=chunk_rows)
        self._found: deque[CandidateSets] = deque()

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        """The chosen ones of the batch's positions, [N] float (0 or 1)."""
        chosen = torch.ones(len(batch.gold), dtype=torch.bool, device=hidden.device)
        if self.choose is not None:
            picked = self.choose(batch, self.confidence(batch, hidden, weight).numpy())
            chosen = torch.from_numpy(picked).to(hidden.device)
        self._found.append(self._sets(hidden[chosen], weight, batch.gold[chosen]))
        return chosen.float()

    def take(self) -> CandidateSets:
        """The sets of the oldest micro-batch whose sets were not taken yet: `pipeline.forward` consumes in order."""
        return self._found.popleft()

    def _sets(self, hidden: Tensor, weight: Tensor, gold: Tensor) -> CandidateSets:
        """The sets of n positions; the same on every tensor rank."""
        return linear_dynamic_topk(
            hidden,
            weight,
            gold,
            self.rule.tau,
            self.rule.k_max,
            self.confidence.vocab_size,
            self.confidence.shard,
            tile_rows=self.confidence.chunk_rows,
            min_set_size=self.rule.min_set_size,
            always=self.rule.always,
            keep_logits=True,
            kernels=self.kernels,
        )
