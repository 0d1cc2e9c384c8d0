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
