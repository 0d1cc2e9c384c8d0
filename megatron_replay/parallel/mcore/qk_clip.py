"""The largest attention logits of a sharded model, by which MuonClip scales weights.

While it is watched, each layer's attention notes the largest scaled logit of every key/value head. The fused attention
does not report it. So each forward pass computes one more product of queries and keys, in blocks. The ranks' maxima
meet in one small gather after the update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_replay.models.weights import Weight
from megatron_replay.optim.muonclip import qk_factor
from megatron_replay.parallel.mcore.attention import blocks, gathered
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.parallel.ranks.matrix_exchange import Part

NORMS = (".self_attention.q_layernorm.weight", ".self_attention.k_layernorm.weight")


@torch.no_grad()
def largest_logits(query: Tensor, key: Tensor, segments: Tensor, scale: float | None) -> Tensor:
    """Largest causal attention logit of each key/value head: query [T, Hq, D], key [T, Hk, D] -> [Hk] float32."""
    heads = key.shape[1]
    scale = scale or 1 / math.sqrt(key.shape[2])
    found = torch.full((heads,), -math.inf, device=key.device)
    each = key[: int(segments[:, 1].sum())].split(segments[:, 1].tolist())
    for block in blocks(segments, key.device):
        q, k = query[block.queries], gathered(each, block).transpose(0, 1)
        grouped = q.view(len(q), heads, -1, q.shape[2]).permute(1, 2, 0, 3).reshape(heads, -1, q.shape[2])
        logits = (grouped @ k.transpose(1, 2)).float().view(heads, -1, *block.visible.shape)
        found = torch.maximum(found, logits.masked_fill(~block.visible, -math.inf).amax((1, 2, 3)))
    return found * scale


class WatchedLogits:
    """`optim.AttentionLogits` of a megatron model.

    `held` gives for each model parameter the tensor that the optimizer updates in its stead, and that tensor's part of
    the whole.
    """

    def __init__(self, model: Model, held: Mapping[Tensor, tuple[Tensor, Part]]) -> None:
        self._model = model
        self._weights: list[tuple[Weight, Tensor, Part]] = []
        for _, weight, parameter in model.parameters():
            if parameter in held and (weight.kind == "qkv" or weight.name.endswith(NORMS)):
                self._weights.append((weight, *held[parameter]))
        self._largest: dict[int, Tensor] = {}
        for layer in model.module.decoder.layers:
            layer.self_attention.core_attention.watch = self._watcher(layer.layer_number - 1)

    def _watcher(self, layer: int) -> Any:
        def see(query: Tensor, key: Tensor, segments: Tensor, scale: float | None) -> None:
            largest = largest_logits(query, key, segments, scale)
            known = self._largest.get(layer)
            self._largest[layer] = largest if known is None else torch.maximum(known, largest)

        return see

    def factors(self, threshold: float) -> Iterator[tuple[Tensor, Tensor]]:
        """See `optim.AttentionLogits.factors`; one gather of [layers, key/value heads]."""
        largest = self._gathered()
        self._largest = {}
        for weight, param, part in self._weights:
            factor = qk_factor(largest[weight.layer], threshold)
            if bool((factor < 1).any()):
                if weight.kind != "qkv":
                    yield param, factor.min().to(param.device)
                elif not self._model.spec.qk_norm:
                    yield param, self._rows(factor, weight, part, param).to(param.device)

    def _gathered(self) -> Tensor:
        world, spec = self._model.world, self._model.spec
        _, heads = self._model.table.heads
        each = heads // world.tensor_size
        table = torch.full((spec.num_layers, heads), -math.inf)
        for layer, largest in self._largest.items():
            table[layer, world.tensor_rank * each : (world.tensor_rank + 1) * each] = largest.cpu()
        return torch.stack(world.gather(table)).amax(0)

    def _rows(self, factor: Tensor, weight: Weight, part: Part, param: Tensor) -> Tensor:
        """The factor of each element of this rank's part of a linear_qkv.

        Query and key rows shrink; value rows stay.
        """
        world, spec = self._model.world, self._model.spec
        local = factor.chunk(world.tensor_size)[world.tensor_rank]
        shrinking = (spec.heads_per_group + 1) * spec.head_dim
        rows = torch.cat([local[:, None].expand(-1, shrinking), torch.ones(len(local), spec.head_dim)], 1).reshape(-1)
        return rows.repeat_interleave(math.prod(weight.shape[1:]))[part.start : part.stop].view(param.shape)
