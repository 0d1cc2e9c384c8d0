"""Build megatron's GPTModel for this rank from a `ModelSpec`, and fill it from a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_replay.config import Layout
from megatron_replay.errors import LayoutError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.models.layout import validate_layout
from megatron_replay.models.lora import A, B, merged
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import OUTPUT, STRIPES, Weight, merge, shard
from megatron_replay.ops import VocabShard
from megatron_replay.ops.shard import Stripes
from megatron_replay.optim import half
from megatron_replay.parallel import shims
from megatron_replay.parallel.mcore import head
from megatron_replay.parallel.mcore.attention import Cache, segment_attention
from megatron_replay.parallel.mcore.last_layer_rows import LastLayerRows
from megatron_replay.parallel.mcore.layers import RMSNorm, TokenRotary
from megatron_replay.parallel.ranks.world import World


@dataclass
class Model:
    """This rank's part of the model."""

    table: WeightTable
    """Every parameter of the whole model.

    It has an adapter while one is trained (`parallel.mcore.lora_layers`). Its factors then stand beside the matrices,
    not merged.
    """
    layout: Layout
    world: World
    config: Any
    """megatron's TransformerConfig."""
    module: Any
    """megatron's GPTModel; `parallel.trainer.make_trainer` wraps it for gradients."""
    dtype: torch.dtype
    head: Any = None
    """The output layer (last stage only)."""
    frozen: frozenset[str] = frozenset()
    """Names of the tensors that are not trained, of the whole model."""
    frozen_by: tuple[float, int] | None = None
    """Fraction and seed, where `freeze_half` chose them."""

    @property
    def spec(self) -> ModelSpec:
        return self.table.spec

    def global_name(self, name: str) -> str:
        """A local parameter name with the layer's number in the whole model."""
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(self.module.decoder.layers[int(parts[2])].layer_number - 1)
        return ".".join(parts)

    def trained(self) -> list[Weight]:
        """The part of `table` that is not frozen."""
        return [weight for weight in self.table if weight.name not in self.frozen]

    def parameters(self) -> Iterator[tuple[str, Weight, Any]]:
        """(global megatron name, its Weight in the table, parameter) of everything this rank holds."""
        for name, parameter in self.module.named_parameters():
            known = self.global_name(name)
            yield known, self.table[known], parameter

    def stripes(self) -> Stripes | None:
        """The order of the vocabulary's rows; None: by id."""
        return Stripes(self.spec.padded_vocab(), STRIPES) if self.table.striped else None

    def rows_of(self, ids: Tensor) -> Tensor:
        """The embedding's rows of token ids, which megatron's embedding takes for ids."""
        stripes = self.stripes()
        return ids if stripes is None else stripes.row_of(ids)

    def freeze(self, names: Iterable[str]) -> None:
        """Stop training these tensors; a tied output layer goes with its embedding.

        It must be called before the model is wrapped for training.
        """
        self.frozen |= set(names)
        for _, weight, parameter in self.parameters():
            parameter.requires_grad_(weight.name not in self.frozen)

    def freeze_half(self, fraction: float, seed: int) -> None:
        """Freeze a `fraction` of the whole model's tensors (`optim.half`), the same ones on every layout.

        Collective, and to be called before the model is wrapped for training. Frozen tensors have neither gradient
        buffer nor optimizer state. The tensors are megatron's: query, key and value are one, and so are gate and up.
        Raises LayoutError where a pipeline stage would have nothing left to train.
        """
        self.freeze(half(((weight.name, weight) for weight in self.table), fraction, seed))
        self.frozen_by = (fraction, seed)
        trained = [any(parameter.requires_grad for parameter in self.module.parameters())]
        idle = [rank for rank, (any_,) in enumerate(self.world.gather_objects(trained)) if not any_]
        if idle:
            raise LayoutError(
                f"train.freeze_share={fraction} leaves rank {idle[0]} nothing to train; lower it, or give every "
                "pipeline stage more layers"
            )

    def use_cache(self, cache: Cache | None) -> None:
        for layer in self.module.decoder.layers:
            layer.self_attention.core_attention.use(cache)


def build(spec: ModelSpec, layout: Layout, world: World, dtype: torch.dtype, *, seq_length: int) -> Model:
    """This rank's GPTModel with uninitialised weights. Raises LayoutError when the ranks do not divide the model."""
    from megatron.core.models.gpt import GPTModel

    split, table = validate_layout(spec, layout), WeightTable.of(spec, layout)
    config = transformer_config(table, layout, dtype, split, cpu=world.device.name == "cpu")
    module = GPTModel(
        config,
        _layer_specs(spec, split[world.pipeline_rank]),
        vocab_size=spec.padded_vocab(),
        max_sequence_length=seq_length,
        pre_process=world.first_stage,
        post_process=world.last_stage,
        position_embedding_type="rope",
        rotary_base=int(spec.rope_base),
        parallel_output=True,
        share_embeddings_and_output_weights=spec.tied,
    )
    module.rotary_pos_emb = TokenRotary(spec)
    module.to(world.torch_device)
    task_head = None
    if world.last_stage:
        task_head = head.install(module)
        LastLayerRows(module.decoder.layers[-1])
    return Model(table, layout, world, config, module, dtype, task_head)


def transformer_config(table: WeightTable, layout: Layout, dtype: torch.dtype, split: list[int], *, cpu: bool) -> Any:
    """megatron's TransformerConfig, every field by keyword (MindSpeed replaces the class)."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    spec = table.spec
    q_heads, kv_heads = table.heads
    recompute: dict[str, Any] = {}
    if layout.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif layout.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    uneven = uneven_stages(split, TransformerConfig) if len(set(split)) > 1 else {}
    return TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=q_heads,
        num_query_groups=kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.norm_eps,
        qk_layernorm=spec.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        attention_softmax_in_fp32=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=cpu,
        perform_initialization=False,  # every weight is loaded
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        calculate_per_token_loss=True,
        **recompute,
        **uneven,
    )


def uneven_stages(split: list[int], config: Any) -> dict[str, Any]:
    """The fields of megatron's TransformerConfig that give each stage its layers.

    Before 0.13 it knows a first and a last stage that differ from those between. For another split LayoutError names
    the nearest such one.
    """
    if "pipeline_model_parallel_layout" in config.__dataclass_fields__:
        stages = [["decoder"] * layers for layers in split]
        return {"pipeline_model_parallel_layout": [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]}
    near = nearest_split(split)
    if near != split:
        raise LayoutError(
            f"layers per stage {split}: megatron-core {shims.megatron_version()} needs all stages between the first "
            "and the last alike; "
            f"use layout.split={near} or megatron-core>=0.13"
        )
    last = {"num_layers_in_last_pipeline_stage": split[-1]} if len(split) > 2 else {}  # of two it wants the first
    return {"num_layers_in_first_pipeline_stage": split[0], **last}


def nearest_split(split: list[int]) -> list[int]:
    """A split into as many layers and stages, whose stages between the first and the last are alike.

    Of these it is the one to which the fewest layers must change their stage.
    """
    layers, between = sum(split), len(split) - 2
    if between < 1:
        return split
    possible = [
        [first, *[each] * between, layers - first - each * between]
        for each in range(1, layers // between + 1)
        for first in range(1, layers - each * between)
    ]
    return min(possible, key=lambda other: sum(abs(a - b) for a, b in zip(split, other, strict=True)))


def _layer_specs(spec: ModelSpec, layers: int) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(qk_layernorm=spec.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = segment_attention()
    if spec.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


@torch.no_grad()
def load_hf(model: Model, folder: HFFolder) -> None:
    """Copy a Hugging Face folder's weights into this rank's model, one tensor in memory at a time."""
    folder.check(model.spec)
    for _, weight, parameter in model.parameters():
        parameter.copy_(local_part(weight, folder, model.world))


def local_part(weight: Weight, folder: HFFolder, world: World) -> Tensor:
    """This rank's slice of one megatron tensor, read from the folder."""
    whole = merge(weight, {name: folder.read(name) for name in weight.hf})
    return shard(whole, weight.axis, world.tensor_rank, world.tensor_size)


def vocab_shard(model: Model) -> VocabShard:
    """The embedding and head rows of this rank, the ids in them, and the group that holds the other rows."""
    world = model.world
    rows = model.spec.padded_vocab() // world.tensor_size
    group = world.tensor_group if world.tensor_size > 1 else None
    return VocabShard(world.tensor_rank * rows, (world.tensor_rank + 1) * rows, group, model.stripes())


@torch.no_grad()
def squared_distance(model: Model, base: HFFolder) -> tuple[float, float]:
    """(|theta - theta_0|^2, |theta_0|^2) over the whole model, float64, the same on every rank.

    Each parameter counts once, an adapter merged.
    """
    moved = size = 0.0
    base.check(model.spec)
    held = {name: parameter for name, _, parameter in model.parameters()}
    for name, weight, parameter in model.parameters():
        factor = name.endswith((A, B))
        if not factor and counted(name, weight, model.world, sharded_over_data=False):
            start = local_part(weight, base, model.world).double()
            factors = model.table.factors_of(weight)
            if model.table.adapter is not None and factors is not None:
                a, b = (held[factor.name] for factor in factors)
                parameter = merged(parameter, a, b, model.table.adapter)
            moved += float((parameter.detach().cpu().double() - start).square().sum())
            size += float(start.square().sum())
    row = torch.tensor([moved, size], dtype=torch.float64)
    total = torch.stack(model.world.gather(row)).sum(0)
    return float(total[0]), float(total[1])


def counted(name: str, weight: Weight, world: World, *, sharded_over_data: bool) -> bool:
    """True where this rank's copy of a parameter adds to a sum over the whole model: of replicas exactly one does.

    - Replicated over the tensor group: its first rank adds.
    - A tied head on a last stage of its own does not add; the embedding does.
    - Where every data-parallel rank holds everything (no ZeRO-1) the first one adds.
    """
    if name == OUTPUT and weight.name != OUTPUT:
        return False
    if weight.axis is None and world.tensor_rank != 0:
        return False
    return sharded_over_data or world.data_rank == 0
