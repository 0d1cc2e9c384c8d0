"""Our optimizers inside megatron's wrappers, and the map that says who holds what.

megatron's wrappers (fp32, bf16 with fp32 main weights, ZeRO-1) keep their tasks: main weights, gradient copies,
parameter gathers. Only the inner torch optimizer is exchanged. Each logical tensor of the whole model has one row in a
table, which one gather a step fills: see `optim.shards`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_replay.config import ADAM_BETAS
from megatron_replay.config import Optimizer as OptimizerConfig
from megatron_replay.errors import ConfigError
from megatron_replay.models.weights import Weight
from megatron_replay.optim import HIDDEN, OPTIMIZERS, Kind, MuonClip, Placement, ReplayOptimizer, build_optimizer
from megatron_replay.parallel.mcore.model import Model, counted
from megatron_replay.parallel.mcore.qk_clip import WatchedLogits
from megatron_replay.parallel.mcore.zero1 import only
from megatron_replay.parallel.ranks.matrix_exchange import Exchange, Part

PARTS = ("embedding.", "decoder.final_layernorm.", "output_layer.")
"""The parts that belong to no layer.

Each is a layer of its own for `scope="layer"`, so that no group spans two pipeline stages.
"""


class ModelShards:
    """`optim.Shards` of a megatron model: parameter -> row of the whole model's table, and the sum over all ranks."""

    def __init__(self, model: Model, parts: Mapping[Tensor, Part]) -> None:
        table, self._world = model.trained(), model.world
        self._layers = [layer_of(weight, model.spec.num_layers) for weight in table]
        self._kinds = [kind_of(weight) for weight in table]
        self._parts = dict(parts)
        hidden = {param: part for param, part in parts.items() if self._kinds[part.row] in HIDDEN}
        self._exchange = Exchange(
            model.world, table, hidden, torch.float64 if model.dtype == torch.float64 else torch.float32
        )

    def place(self, params: Sequence[Tensor]) -> Placement:
        found = [self._parts[param] for param in params]
        return Placement(
            rows=[part.row for part in found],
            counted=[part.counted for part in found],
            layers=self._layers,
            kinds=self._kinds,
        )

    def each_whole(
        self,
        params: Sequence[Tensor],
        values: Callable[[int], Tensor],
        function: Callable[[Tensor], Tensor],
        stacked: int = 1,
    ) -> Iterator[tuple[int, Tensor]]:
        return self._exchange.each_whole(params, values, function, stacked)

    def sum(self, table: Tensor) -> Tensor:
        """The sum of all ranks' tables, gathered and added in rank order.

        It is the same bits on every rank and every run, also where no fp64 all-reduce exists.
        """
        parts = self._world.gather(table)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total


def layer_of(weight: Weight, layers: int) -> int:
    if weight.layer is not None:
        return weight.layer
    return layers + next(i for i, start in enumerate(PARTS) if weight.name.startswith(start))


def kind_of(weight: Weight) -> Kind:
    if len(weight.shape) == 1:
        return "vector"
    if weight.kind == "vocab":
        return "embedding"
    return "attention" if weight.kind in ("qkv", "o_proj") else "matrix"


def wrap(model: Model, wrapped: Any, settings: OptimizerConfig, kernels: str = "auto") -> tuple[Any, ReplayOptimizer]:
    """(megatron's optimizer, our inner one) for a model wrapped in megatron's DistributedDataParallel."""
    from megatron.core.optimizer import OptimizerConfig as MegatronConfig
    from megatron.core.optimizer import get_megatron_optimizer

    beta1, beta2 = settings.betas or ADAM_BETAS  # they are of the Adam that is exchanged, so they decide nothing
    outer = get_megatron_optimizer(
        MegatronConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            bf16=model.dtype == torch.bfloat16,
            params_dtype=model.dtype,
            clip_grad=0.0,  # the inner optimizer clips: its one collective yields the norm too
            use_distributed_optimizer=wrapped.ddp_config.use_distributed_optimizer,
        ),
        [wrapped],
    )
    return outer, _exchange(only(outer), model, settings, kernels)


def foreign_options(settings: OptimizerConfig) -> dict[str, str]:
    """Options that this optimizer does not take but another does, with the name of that one.

    They are left out, so that changing `optimizer.name` alone makes a comparison.
    """
    return OPTIMIZERS.foreign(settings.name, _given(settings))


def _given(settings: OptimizerConfig) -> dict[str, Any]:
    """The options that a configuration sets, `betas` among them; the optimizer has a default for every other one."""
    return settings.options if settings.betas is None else {"betas": settings.betas, **settings.options}


def _exchange(outer: Any, model: Model, settings: OptimizerConfig, kernels: str) -> ReplayOptimizer:
    old = outer.optimizer
    placeholder = [torch.nn.Parameter(torch.zeros(1))]
    for option in ("shards", "logits", "kernels", "main_weights"):
        if option in settings.options:
            raise ConfigError(f"optimizer.{option} is given by the trainer, not by a configuration; remove it")
    foreign = foreign_options(settings)
    inner = build_optimizer(
        settings.name,
        placeholder,
        settings.lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        kernels=kernels,
        **{option: value for option, value in _given(settings).items() if option not in foreign},
    )
    for group in old.param_groups:
        for key in old.defaults.keys() - {"lr", "weight_decay"}:
            group.pop(key, None)  # AdamW's own settings; ours are the inner optimizer's defaults
        group["step"] = 0
    inner.param_groups = old.param_groups  # a constructor refuses fp32 shards, which are views
    inner.state.clear()  # of the placeholder
    inner.remember_base()
    parts = _parts(outer, inner, model)
    inner.attach(ModelShards(model, dict(parts.values())))
    if isinstance(inner, MuonClip) and inner.variant == "qk":
        if model.frozen:
            raise ConfigError(
                "optimizer 'muonclip' scales attention's weights where logits grow, but adapter.rank or "
                "train.freeze_share "
                "freezes some of them; use another optimizer"
            )
        inner.logits = WatchedLogits(model, parts)
    outer.optimizer = inner
    outer.init_state_fn = lambda optimizer, config=None: optimizer.init_state()
    return inner


def _parts(outer: Any, inner: ReplayOptimizer, model: Model) -> dict[Tensor, tuple[Tensor, Part]]:
    """Model parameter -> (the tensor that the inner optimizer updates in its stead, its part of the whole tensor)."""
    rows = {weight.name: row for row, weight in enumerate(model.trained())}
    held = dict(_held(outer, inner))
    zero1 = hasattr(outer, "model_param_group_index_map")
    parts = {}
    for name, weight, parameter in model.parameters():
        if parameter in held:
            is_counted = counted(name, weight, model.world, sharded_over_data=zero1)
            span = outer._get_model_param_range_map(parameter)["param"] if zero1 else None
            start, stop = (span.start, span.end) if span else (0, parameter.numel())
            parts[parameter] = (
                held[parameter],
                Part(rows[weight.name], model.world.tensor_rank, start, stop, is_counted),
            )
    return parts


def _held(outer: Any, inner: ReplayOptimizer) -> list[tuple[Tensor, Tensor]]:
    """(model parameter, the tensor that the inner optimizer updates in its stead).

    That is the parameter itself, its fp32 main copy, or this rank's shard of that copy.
    """
    if hasattr(outer, "model_param_group_index_map"):
        return [
            (p, inner.param_groups[group]["params"][order])
            for p, (group, order) in outer.model_param_group_index_map.items()
        ]
    if hasattr(outer, "fp32_from_float16_groups"):
        low = [
            pair
            for lows, mains in zip(outer.float16_groups, outer.fp32_from_float16_groups, strict=True)
            for pair in zip(lows, mains, strict=True)
        ]
        return low + [(p, p) for group in outer.fp32_from_fp32_groups for p in group]
    return [(p, p) for group in inner.param_groups for p in group["params"]]


@contextmanager
def adam_form(inner: ReplayOptimizer, *, zero1: bool) -> Iterator[None]:
    """A context in which the optimizer's state is as megatron's checkpoints take it.

    It is filled, and under ZeRO-1 has exactly Adam's two tensors of every parameter. A moment that an optimizer does
    not keep (the second of Muon's matrices) is written as zeros and dropped after reading. The base weights of `pull`
    are not written: they are the model a run starts from.
    """
    inner.init_state()
    params = [param for group in inner.param_groups for param in group["params"]]
    bases = {param: inner.state[param].pop("base") for param in params if "base" in inner.state[param]}
    moments = ("exp_avg", "exp_avg_sq") if zero1 else ()
    lacking = [(param, key) for param in params for key in moments if key not in inner.state[param]]
    for param, key in lacking:
        inner.state[param][key] = torch.zeros_like(param)
    try:
        yield
    finally:
        for param, key in lacking:
            del inner.state[param][key]
        for param, base in bases.items():
            inner.state[param]["base"] = base


@torch.no_grad()
def restripe_state(model: Model, outer: Any, inner: ReplayOptimizer, *, striped: bool) -> None:
    """Bring the vocabulary rows of main weights and optimizer state into the model's order. Collective.

    `striped` says whether they lie in stripes now.
    """
    ours, outer = model.trained(), only(outer)
    theirs = [dataclasses.replace(weight, striped=striped) if weight.kind == "vocab" else weight for weight in ours]
    # a tied head's stage has no other copy, so there it counts
    counts = hasattr(outer, "model_param_group_index_map") or model.world.data_rank == 0
    found = [(held, part) for held, part in _parts(outer, inner, model).values() if ours[part.row].kind == "vocab"]
    parts = {held: dataclasses.replace(part, counted=counts) for held, part in found}
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    exchange = Exchange(model.world, theirs, parts, dtype, into=ours)
    params, keys = list(parts), inner.keys_of("embedding")

    def tensors(index: int) -> list[Tensor]:
        return [params[index], *(inner.state[params[index]][key] for key in keys)]

    for i, moved in exchange.each_whole(
        params, lambda index: torch.stack(tensors(index)), lambda values: values, 1 + len(keys)
    ):
        for tensor, value in zip(tensors(i), moved, strict=True):
            tensor.copy_(value)


def set_rates(inner: ReplayOptimizer, lr: float, weight_decay: float) -> None:
    """Give every parameter group its learning rate and its weight decay for the next step.

    megatron's own scheduler would do the same. megatron puts norms and biases into a group with wd_mult = 0.
    """
    for group in inner.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
