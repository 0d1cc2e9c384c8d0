"""Every parameter of a model by its name, made once: megatron-core's names and shapes beside Hugging Face's.

The tensors of a new family are entered in `_layer`. Head padding, the order of the vocabulary's rows and an adapter's
factors are settled here. So a reader, a writer or a model asks its table and passes no settings along.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_replay.config import Adapter, Layout
from megatron_replay.errors import CheckpointError
from megatron_replay.models.lora import beside, factors
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weights import EMBEDDING, OUTPUT, Axis, Kind, Weight

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightTable:
    """The distinct parameters of a whole model, the same on every rank.

    Iterating gives them in the model's order, an adapter's factors last. A tied output layer is not listed: it is the
    embedding.
    """

    spec: ModelSpec
    head_multiple: int = 1
    """Key/value heads are padded with zero heads up to a multiple of this."""
    striped: bool = False
    """True where the vocabulary's rows lie in stripes."""
    adapter: Adapter | None = None
    """The adapter whose factors stand beside the matrices."""

    @classmethod
    def of(cls, spec: ModelSpec, layout: Layout, adapter: Adapter | None = None) -> WeightTable:
        """The table of a model in a layout."""
        return cls(spec, head_multiple=layout.head_multiple, striped=layout.striped, adapter=adapter)

    def with_adapter(self, adapter: Adapter | None) -> WeightTable:
        return replace(self, adapter=adapter)

    @cached_property
    def base(self) -> Sequence[Weight]:
        """The model's own parameters, without an adapter's factors."""
        spec = self.spec
        layers = [weight for layer in range(spec.num_layers) for weight in _layer(spec, layer, self.heads)]
        norm = Weight("decoder.final_layernorm.weight", ("model.norm.weight",), "copy", None, *_alike(spec.hidden_size))
        output = [] if spec.tied else [self._vocabulary(OUTPUT, "lm_head.weight")]
        return [self._vocabulary(EMBEDDING, "model.embed_tokens.weight"), *layers, norm, *output]

    @cached_property
    def factors(self) -> Sequence[Weight]:
        """The adapter's factors, in the order of their matrices."""
        return factors(self.base, self.adapter) if self.adapter else []

    def __iter__(self) -> Iterator[Weight]:
        yield from self.base
        yield from self.factors

    def __len__(self) -> int:
        return len(self.base) + len(self.factors)

    def __getitem__(self, name: str) -> Weight:
        """The Weight of a megatron parameter.

        A tied model's `output_layer.weight` (a last stage holds a copy) is the embedding. Raises CheckpointError for a
        name the model does not have.
        """
        if name not in self._by_name:
            near = difflib.get_close_matches(name, self._by_name, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            model = f"{self.spec.architecture} with {self.spec.num_layers} layers"
            raise CheckpointError(f"{model} has no parameter {name!r}{hint}")
        return self._by_name[name]

    def factors_of(self, weight: Weight) -> tuple[Weight, Weight] | None:
        """The factors A and B beside a matrix; None where it has none."""
        a, b = (self._by_name.get(name) for name in beside(weight))
        return None if a is None or b is None else (a, b)

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Every Hugging Face tensor of the model with its shape, in the model's order."""
        return {name: shape for weight in self.base for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)}

    @property
    def heads(self) -> tuple[int, int]:
        """(query heads, key/value heads), padding included."""
        return self.spec.padded_heads(self.head_multiple)

    @property
    def has_padded_heads(self) -> bool:
        return self.heads != self.spec.padded_heads()

    @property
    def numel(self) -> int:
        """Elements of the model's own parameters, padding included."""
        return sum(math.prod(weight.shape) for weight in self.base)

    @cached_property
    def _by_name(self) -> dict[str, Weight]:
        found = {weight.name: weight for weight in self}
        return {OUTPUT: found[EMBEDDING], **found}

    def _vocabulary(self, name: str, hf: str) -> Weight:
        rows, hidden = self.spec.vocab_size, self.spec.hidden_size
        shape = (self.spec.padded_vocab(), hidden)
        return Weight(name, (hf,), "vocab", 0, shape, ((rows, hidden),), striped=self.striped)


def _layer(spec: ModelSpec, layer: int, padded: tuple[int, int]) -> Iterator[Weight]:
    """The parameters of one decoder layer: pre-norm attention, pre-norm gated MLP."""
    hidden, ffn, dim = spec.hidden_size, spec.ffn_size, spec.head_dim
    q, kv = spec.num_heads * dim, spec.num_kv_heads * dim
    heads, groups = padded

    def entry(
        name: str, hf: Sequence[str], kind: Kind, axis: Axis, shape: Shape, hf_shapes: tuple[Shape, ...]
    ) -> Weight:
        return Weight(
            f"decoder.layers.{layer}.{name}",
            tuple(f"model.layers.{layer}.{part}" for part in hf),
            kind,
            axis,
            shape,
            hf_shapes,
            layer=layer,
            num_layers=spec.num_layers,
            groups=spec.num_kv_heads if kind == "qkv" else 1,
        )

    def norm(name: str, hf: str, size: int) -> Weight:
        return entry(f"{name}.weight", [f"{hf}.weight"], "copy", None, *_alike(size))

    yield norm("input_layernorm", "input_layernorm", hidden)
    fused, parts = (heads + 2 * groups) * dim, [f"self_attn.{x}_proj.weight" for x in "qkv"]
    qkv_shapes = ((q, hidden), (kv, hidden), (kv, hidden))
    yield entry("self_attention.linear_qkv.weight", parts, "qkv", 0, (fused, hidden), qkv_shapes)
    if spec.qk_norm:
        for x in "qk":
            yield norm(f"self_attention.{x}_layernorm", f"self_attn.{x}_norm", dim)
    proj = (hidden, heads * dim)
    yield entry("self_attention.linear_proj.weight", ["self_attn.o_proj.weight"], "o_proj", 1, proj, ((hidden, q),))
    yield norm("pre_mlp_layernorm", "post_attention_layernorm", hidden)
    halves = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    yield entry("mlp.linear_fc1.weight", halves, "gate_up", "gate_up", (2 * ffn, hidden), ((ffn, hidden),) * 2)
    yield entry("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], "copy", 1, *_alike(hidden, ffn))


def _alike(*shape: int) -> tuple[Shape, tuple[Shape, ...]]:
    """(megatron shape, Hugging Face shapes) of a tensor that is the same in both."""
    return shape, (shape,)
