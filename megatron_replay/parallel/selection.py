"""The tasks of Stage 0: the confidence of every target position, and the candidate sets of the chosen ones.

Logits exist for a chunk of rows at a time.

N target positions of a micro-batch, n of them chosen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_replay.ops import CandidateSets, VocabShard, linear_dynamic_topk, target_logprobs
from megatron_replay.parallel.batch import MicroBatch, Task
from megatron_replay.parallel.mcore.model import Model, vocab_shard


@dataclass(frozen=True, kw_only=True)
class SetRule:
    """How large a candidate set is (paper section 2)."""

    tau: float
    k_max: int
    min_set_size: int
    vocab_size: int
    """Ids from here on are padding rows."""
    chunk_rows: int
    always: tuple[int, ...] = ()
    """Ids that enter every set."""
    kernels: str = "auto"


Chooser = Callable[[MicroBatch, np.ndarray], np.ndarray]
"""(batch, confidence [N]) -> chosen [N] bool."""


class Selection:
    """The task of Stage 0: finds the candidate sets of each micro-batch, and keeps them until they are taken."""

    def __init__(self, model: Model, rule: SetRule, choose: Chooser | None = None) -> None:
        """choose: decides from the confidence which positions get a set; None: all of them."""
        self.shard, self.rule, self.choose = vocab_shard(model), rule, choose
        self._found: deque[CandidateSets] = deque()

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        """Which of the batch's positions were chosen, [N] float (0 or 1)."""
        chosen = torch.ones(len(batch.gold), dtype=torch.bool, device=hidden.device)
        if self.choose is not None:
            picked = self.choose(batch, confidence(hidden, weight, batch.gold, self.shard, self.rule))
            chosen = torch.from_numpy(picked).to(hidden.device)
        self._found.append(candidate_sets(hidden[chosen], weight, batch.gold[chosen], self.shard, self.rule))
        return chosen.float()

    def take(self) -> CandidateSets:
        """The sets of the oldest micro-batch whose sets were not taken yet: `pipeline.forward` consumes in order."""
        return self._found.popleft()


def confidence_task(model: Model, rule: SetRule) -> Task:
    """p(gold) of every position of the batch, [N]."""
    shard = vocab_shard(model)
    return lambda batch, hidden, weight: torch.from_numpy(confidence(hidden, weight, batch.gold, shard, rule))


def confidence(hidden: Tensor, weight: Tensor, gold: Tensor, shard: VocabShard, rule: SetRule) -> np.ndarray:
    """p(gold) under the model, [N] in [0, 1]."""
    logp = target_logprobs(hidden, weight, gold, shard, vocab_size=rule.vocab_size, chunk_rows=rule.chunk_rows)
    return logp.exp().clamp(max=1.0).cpu().numpy()


def candidate_sets(hidden: Tensor, weight: Tensor, gold: Tensor, shard: VocabShard, rule: SetRule) -> CandidateSets:
    """The sets of n positions; the same on every tensor rank."""
    return linear_dynamic_topk(
        hidden,
        weight,
        gold,
        rule.tau,
        rule.k_max,
        rule.vocab_size,
        shard,
        tile_rows=rule.chunk_rows,
        min_set_size=rule.min_set_size,
        always=rule.always,
        keep_logits=True,
        kernels=rule.kernels,
    )
