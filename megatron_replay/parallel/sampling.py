"""Sampling of tokens by the Gumbel-max rule, with noise that no layout of ranks changes.

argmax_j (z_j / temperature + g_j) with Gumbel noise g is a draw from softmax(z / temperature) (Gumbel 1954; Maddison et
al., arXiv 1411.0030).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_replay.ops import VocabShard


@dataclass(frozen=True)
class Sampling:
    """Draws at a temperature. Token n of text i depends on the logits, on the seed, on i and on n alone."""

    temperature: float = 1.0
    seed: int = 0
    numbers: tuple[int, ...] = ()
    """The number of each text of a call, by which its draws are its own; when empty, its place in the call."""

    def noise(self, texts: Sequence[int], at: int, vocab_size: int) -> Tensor:
        """Gumbel noise of token `at` of each of some texts of the call: [len(texts), vocab_size] float32.

        PCG64's raw stream is fixed across numpy's versions.
        """
        rows = []
        for text in texts:
            words = [self.seed % 2**64, self.numbers[text] if self.numbers else text, at]
            raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(vocab_size)
            uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
            rows.append((-np.log(-np.log(uniform))).astype(np.float32))
        return torch.from_numpy(np.stack(rows))


def argmax(
    hidden: Tensor,
    weight: Tensor,
    shard: VocabShard,
    vocab_size: int,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Id of the largest logit of each row, the lowest id among equals; [N] int64, the same on every tensor rank.

    With Gumbel noise [N, vocab_size] it is a draw from the softmax of logits / temperature.
    """
    logits = (hidden @ weight.t()).float().nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    real, ids = shard.by_id(logits, vocab_size)
    if noise is not None:
        real = real / temperature + noise[:, ids]
    if len(ids):
        value, column = real.max(1)  # of equal ones the first, which is the lowest id
        id = ids[column]
    else:
        value, id = logits.new_full(logits.shape[:1], -torch.inf), ids.new_full(logits.shape[:1], vocab_size)
    values, found = shard.gather(value, id)
    return torch.where(values == values.amax(0), found, vocab_size).amin(0)
