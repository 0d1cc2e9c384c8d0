"""MuonClip (arXiv 2507.20534): Muon with limited attention logits.

Query and key weights shrink after a step in which these logits grew too large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from megatron_replay.errors import ConfigError
from megatron_replay.optim.base import OPTIMIZERS, ParamUpdate
from megatron_replay.optim.muon import Muon, MuonOptions
from megatron_replay.optim.option_checks import check_choice, check_number
from megatron_replay.optim.shards import Placement
from megatron_replay.optim.stats import clip_factor

Variant = Literal["qk", "paper"]


def qk_factor(max_logit: Tensor, threshold: float) -> Tensor:
    """sqrt(min(1, threshold / S)) for the largest attention logit S of each head [heads].

    Applied to query and key both, it takes S down to the threshold.
    """
    return (threshold / max_logit.clamp(min=threshold)).sqrt()


class AttentionLogits(Protocol):
    """A source of the attention logits of the forward passes since the last step."""

    def factors(self, threshold: float) -> Iterable[tuple[Tensor, Tensor]]:
        """(parameter of the optimizer, factor that broadcasts to it) of the query and key weights that must shrink.

        It forgets the logits. It is called once after each update, on every rank.
        """
        ...


class ObservedLogits:
    """`AttentionLogits` for a model of your own: call `observe` with the largest logits of every forward pass.

    layers: for each attention layer its query and key weights, [heads D, H] and [kv heads D, H]. Where a norm follows
    the projections (Qwen3) give the weights [D] of these norms, since scaling the projections would change nothing.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], num_kv_heads: int) -> None:
        self.layers = list(layers)
        self.num_kv_heads = num_kv_heads
        self._largest: dict[int, Tensor] = {}

    def observe(self, layer: int, max_logit: Tensor) -> None:
        """Record the largest scaled attention logit of each head, [heads].

        Query heads of one kv head follow each other.
        """
        largest = max_logit.detach().view(self.num_kv_heads, -1).amax(1)
        self._largest[layer] = torch.maximum(largest, self._largest[layer]) if layer in self._largest else largest

    def factors(self, threshold: float) -> Iterable[tuple[Tensor, Tensor]]:
        for layer, largest in self._largest.items():
            factor = qk_factor(largest, threshold)
            for weight in self.layers[layer]:
                if weight.ndim == 1:
                    yield weight, factor.min()
                elif bool((factor < 1).any()):
                    yield weight, factor.repeat_interleave(weight.shape[0] // self.num_kv_heads)[:, None]
        self._largest = {}


@OPTIMIZERS.register("muonclip")
class MuonClip(Muon):
    """Muon with QK-Clip (`variant="qk"`): after the step no attention logit seen would exceed `threshold`.

    Query and key weights are scaled for that. Key/value heads are scaled as a whole: the factor of a group is that of
    its largest logit. `logits` says where the logits come from; the trainer gives its own.

    `variant="paper"` is how arXiv 2510.09152 describes MuonClip. It clips the gradients of attention's matrices to
    `clip_grad` by themselves, and all others by themselves.
    """

    prefix = "muonclip"

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        variant: Variant = "qk",
        threshold: float = 100.0,
        logits: AttentionLogits | None = None,
        **others: Unpack[MuonOptions],
    ) -> None:
        check_choice("variant", variant, get_args(Variant))
        check_number("threshold", threshold, above=0)
        super().__init__(params, lr, **others)
        self.variant, self.threshold, self.logits = variant, threshold, logits
        self._scales: list[float] = []

    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        super().plan(sums, place, scale)
        self._scales = [scale] * len(place.kinds)
        if self.variant == "qk" and self.logits is None:
            raise ConfigError(
                "muonclip variant='qk' must know the attention logits; give logits=ObservedLogits(...), or "
                "variant='paper'"
            )
        if self.variant == "paper":
            attention = torch.tensor([kind == "attention" for kind in place.kinds])
            if not attention.any():
                raise ConfigError(
                    "muonclip variant='paper' clips attention's gradients apart, and no parameter is known as "
                    "attention's; "
                    "give them a parameter group with kind='attention', or use variant='qk'"
                )
            norms = [math.sqrt(float(sums[part, 2].sum())) for part in (attention, ~attention)]
            factors = [clip_factor(norm, self.clip_grad) for norm in norms]
            self._scales = [factors[0] if flag else factors[1] for flag in attention.tolist()]
            self.metrics |= {"muonclip/attention_norm": norms[0], "muonclip/other_norm": norms[1]}

    def gradient_scale(self, row: int) -> float:
        return self._scales[row]

    def apply(self, updates: Sequence[ParamUpdate], place: Placement) -> None:
        super().apply(updates, place)
        if self.logits is not None and self.variant == "qk":
            for param, factor in self.logits.factors(self.threshold):
                weight = self.weight(param)
                weight.mul_(factor.to(weight.dtype))
                self.round_main_weights(param)
