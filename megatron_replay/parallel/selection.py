"""The head's tasks of Stage 0: confidence of every target position, and the candidate sets of the chosen ones. Logits
exist a chunk of rows at a time.

N target positions of a micro-batch, n of them chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_replay.candidates import CandidateRule
from megatron_replay.ops import CandidateSets, VocabShard, linear_dynamic_topk, target_logprobs
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.mcore.head import Task
from megatron_replay.parallel.mcore.model import Model, vocab_shard
from megatron_replay.parallel.pipeline import TaskOf


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A rule of candidate sets, and how the logits it is applied to are made."""

    rule: CandidateRule
    vocab_size: int
    """Ids from here on are padding rows."""
    chunk_rows: int
    """Logits exist for this many positions at a time."""
    kernels: str = "auto"


Chooser = Callable[[MicroBatch, np.ndarray], np.ndarray]
"""(batch, confidence [N]) -> chosen [N] bool."""


def select_task(model: Model, selection: Selection, choose: Chooser | None) -> TaskOf:
    """Leaves the candidate sets in notes["sets"] and returns which of the batch's positions were chosen, [N] float (0
    or 1).

    choose: decides from the confidence; None: every position of the batch is wanted.
    """
    shard = vocab_shard(model)

    def task_of(batch: MicroBatch) -> Task:
        def task(hidden: Tensor, weight: Tensor) -> Tensor:
            chosen = torch.ones(len(batch.gold), dtype=torch.bool, device=hidden.device)
            if choose is not None:
                picked = choose(batch, confidence(hidden, weight, batch.gold, shard, selection))
                chosen = torch.from_numpy(picked).to(hidden.device)
            batch.notes["sets"] = candidate_sets(hidden[chosen], weight, batch.gold[chosen], shard, selection)
            return chosen.float()

        return task

    return task_of


def confidence_task(model: Model, selection: Selection) -> TaskOf:
    """p(gold) of every position of the batch, [N]."""
    shard = vocab_shard(model)

    def task_of(batch: MicroBatch) -> Task:
        def task(hidden: Tensor, weight: Tensor) -> Tensor:
            return torch.from_numpy(confidence(hidden, weight, batch.gold, shard, selection))

        return task

    return task_of


def confidence(hidden: Tensor, weight: Tensor, gold: Tensor, shard: VocabShard, selection: Selection) -> np.ndarray:
    """p(gold) under the model, [N] in [0, 1]."""
    logp = target_logprobs(
        hidden, weight, gold, shard, vocab_size=selection.vocab_size, chunk_rows=selection.chunk_rows
    )
    return logp.exp().clamp(max=1.0).cpu().numpy()


def candidate_sets(
    hidden: Tensor, weight: Tensor, gold: Tensor, shard: VocabShard, selection: Selection
) -> CandidateSets:
    """The sets of n positions; the same on every tensor rank."""
    rule = selection.rule
    return linear_dynamic_topk(
        hidden,
        weight,
        gold,
        rule.tau,
        rule.k_max,
        selection.vocab_size,
        shard,
        tile_rows=selection.chunk_rows,
        min_set_size=rule.min_set_size,
        always=rule.always,
        keep_logits=True,
        kernels=selection.kernels,
    )
