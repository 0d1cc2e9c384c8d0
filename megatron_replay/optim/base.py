"""What all our optimizers share: statistics, the norm, clipping, skipping, state and its file form.

A rule only says how a parameter moves.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.registry import Registry

from .options import check_number
from .shards import Placement, Shards
from .stats import clip_factor, tensor_sums

Group = dict[str, Any]

OPTIMIZERS: Registry[ReplayOptimizer] = Registry("optimizer")
"""Every optimizer of this package, by the name a configuration uses."""


class ReplayOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose tensors may be shards, with clipping and the test for a finite gradient inside.

    A step is one pass over the gradients for their sums, one collective (`shards`), one pass for the update. `step` is counted in
    the parameter group (as apex and Megatron do); the rest of the state is per parameter, float32, or float64 for float64 parameters.
    bfloat16 parameters are updated in float32 and rounded: without float32 main weights, updates below their resolution are lost.
    Megatron's wrappers may assign `param_groups` after construction; groups need `params`, `lr` and `weight_decay`, whatever else is
    missing is taken from `defaults`. Parameters without a gradient are left alone.

    After each `step()`: `grad_norm` (before clipping), `last_step_ok`, `metrics` (empty after a skipped step); `skipped` counts the
    steps not done because the gradient was not finite. Those leave parameters, state and step count untouched on every rank.
    """

    state_keys: tuple[str, ...] = ()
    """Names of the per-parameter state tensors, each of the parameter's shape."""
    reads_momentum = False
    """Whether the statistics need `exp_avg` as well as the gradient."""

    def __init__(self, params: ParamsT, defaults: Group, *, clip_grad: float, shards: Shards) -> None:
        check_number("lr", defaults["lr"], at_least=0)
        check_number("weight_decay", defaults["weight_decay"], at_least=0)
        check_number("clip_grad", clip_grad, at_least=0)
        super().__init__(params, {**defaults, "step": 0})
        self.clip_grad = clip_grad
        self.shards = shards
        self.grad_norm = 0.0
        self.last_step_ok = True
        self.skipped = 0
        self.metrics: dict[str, float] = {}

    def attach(self, shards: Shards) -> None:
        """Say who holds the rest of these parameters; from the next step on."""
        self.shards = shards

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            state_dtype(param)

    def setting(self, group: Group, key: str) -> Any:
        """A group's own value, or the default for groups that were made elsewhere and lack the key."""
        return group.get(key, self.defaults[key])

    def init_state(self) -> None:
        """Give every parameter empty state and every group a step count, as loading a checkpoint in place needs."""
        for group in self.param_groups:
            group["step"] = steps_of(group)
            for param in group["params"]:
                self.state_of(param)

    def state_of(self, param: Tensor) -> dict[str, Tensor]:
        """This parameter's state tensors, zeros when it has none yet."""
        state: dict[str, Tensor] = self.state[param]
        for key in self.state_keys:
            if key not in state:
                state[key] = torch.zeros(param.shape, dtype=state_dtype(param), device=param.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one update; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        place = self.shards.place(params)
        sums = self.shards.sum(self._table(params, place)).cpu()
        self.grad_norm = math.sqrt(float(sums[:, 2].sum()))
        self.last_step_ok = math.isfinite(self.grad_norm)
        self.metrics = {}
        if self.last_step_ok:
            self.plan(sums, place.layers, clip_factor(self.grad_norm, self.clip_grad))
            self._update_all(place)
        else:
            self.skipped += 1
        return loss

    @abstractmethod
    def plan(self, sums: Tensor, layers: Sequence[int], scale: float) -> None:
        """Decide what `update` will do: `sums` [rows, 3] is the summed table (float64, cpu), `scale` the clipping factor."""

    @abstractmethod
    def update(self, param: Tensor, grad: Tensor, group: Group, row: int) -> None:
        """Move one parameter, in place; `group["step"]` counts this step already."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state, also from torch.optim.AdamW, whose per-parameter `step` becomes the group's.

        Raises CheckpointError where the parameters of one group have taken different numbers of steps.
        """
        super().load_state_dict(state_dict)
        groups = zip(state_dict["param_groups"], self.param_groups, strict=True)
        for saved, group in groups:
            counts = set()
            for key, param in zip(saved["params"], group["params"], strict=True):
                values = state_dict["state"].get(key, {})
                counts |= {int(values["step"])} if "step" in values else set()
                self._restore(param, values)
            if len(counts) > 1:
                raise CheckpointError(f"parameters of one group have taken {sorted(counts)} steps; one count a group is supported")
            group["step"] = counts.pop() if counts else steps_of(group)

    def _restore(self, param: Tensor, values: dict[str, Any]) -> None:
        # torch has cast the state to the parameter's dtype, which loses bits for bfloat16: take the saved values again
        state = self.state[param] if values else {}
        state.pop("step", None)
        for name, value in values.items():
            if name != "step" and isinstance(value, Tensor):
                state[name] = value.to(param.device, state_dtype(param)).contiguous()

    def _table(self, params: Sequence[Tensor], place: Placement) -> Tensor:
        device = params[0].device if params else torch.device("cpu")
        rows, sums = [], []
        for param, row, counted in zip(params, place.rows, place.counted, strict=True):
            if param.grad is not None and counted:
                rows.append(row)
                sums.append(tensor_sums(_dense(param.grad), self.state.get(param, {}).get("exp_avg") if self.reads_momentum else None))
        table = torch.zeros(len(place.layers), 3, dtype=torch.float64, device=device)
        return table.index_add_(0, torch.tensor(rows, device=device), torch.stack(sums)) if rows else table

    def _update_all(self, place: Placement) -> None:
        rows = iter(place.rows)
        for group in self.param_groups:
            group["step"] = steps_of(group) + 1
            for param, row in zip(group["params"], itertools.islice(rows, len(group["params"])), strict=True):
                if param.grad is not None:
                    self.update(param, param.grad, group, row)


def steps_of(group: Group) -> int:
    """Steps a group has taken; groups made by other optimizers may have no count, or None, or a tensor."""
    return int(group.get("step") or 0)


def state_dtype(param: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for float32 and bfloat16; raises ConfigError for others, float16 above all."""
    if param.dtype in (torch.float32, torch.bfloat16):
        return torch.float32
    if param.dtype == torch.float64:
        return torch.float64
    raise ConfigError(
        f"a parameter of shape {tuple(param.shape)} is {param.dtype}, in which second moments underflow; "
        "keep float32 main weights, or use bfloat16"
    )


def _dense(grad: Tensor) -> Tensor:
    if grad.layout != torch.strided:
        raise ConfigError(
            f"a gradient of shape {tuple(grad.shape)} is {grad.layout}; only dense ones are supported (Embedding: sparse=False)"
        )
    return grad
