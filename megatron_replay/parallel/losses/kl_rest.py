"""KL divergence from the base model to the model over each set and one more outcome: any token outside it.

L_t = sum_{j in S_t} p_tj (ln p_tj - ln q_tj) + rho_t (ln rho_t - ln (1 - sum_{S_t} q_t)), p and q the full softmax of
the base model and of the model, rho_t = 1 - sum_{S_t} p_t. Nothing can leak outside a set, at the price of the full
log-sum-exp of the current logits, some positions at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_replay.ops import linear_terms, restricted_linear_terms
from megatron_replay.parallel.batch import MicroBatch
from megatron_replay.parallel.losses.beside_full import BesideFull
from megatron_replay.parallel.losses.interface import LOSSES
from megatron_replay.parallel.losses.kl import KL, BaseSets
from megatron_replay.parallel.losses.restricted import main_grad

LEAST = 1e-6
"""The least difference of two log-sum-exps that float32 tells from none."""


@LOSSES.register("kl_rest")
class KLRest(BesideFull, KL):
    """KL(base || model) over the stored sets and the rest of the vocabulary as one outcome."""

    def __call__(self, batch: MicroBatch, hidden: Tensor, weight: Tensor) -> Tensor:
        assert isinstance(batch.sets, BaseSets) and batch.sets.entropy is not None and batch.sets.outside is not None
        loss, inside = restricted_linear_terms(
            hidden, weight, batch.sets, self.shard, main_grad=main_grad(weight), kernels=self.kernels
        )
        _, whole = linear_terms(hidden, weight, batch.gold, self.shard, vocab_size=self.vocab_size)
        entropy, rho = (values.to(loss.dtype) for values in (batch.sets.entropy, batch.sets.outside))
        beyond = (whole - inside).clamp(min=LEAST)  # ln (sum over all / sum over the set)
        kept = 1 - rho
        within = kept * (loss + beyond - entropy) + torch.special.xlogy(kept, kept)
        rest = torch.special.xlogy(rho, rho) - rho * torch.log1p(-torch.exp(-beyond))
        total: Tensor = within + rest
        return total
