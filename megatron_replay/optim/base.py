"""The base class of every optimizer here: statistics, the norm, clipping, skipping, state and its file form.

A subclass only gives the update of a parameter.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.kernels.loading import Mode, check_mode
from megatron_replay.optim.option_checks import check_choice, check_number
from megatron_replay.optim.pull import Pull
from megatron_replay.optim.shards import Kind, Placement, Shards
from megatron_replay.optim.stats import COLUMNS, clip_factor, sums_of_each
from megatron_replay.registry import Registry

Group = dict[str, Any]

OPTIMIZERS: Registry[ReplayOptimizer] = Registry("optimizer")
"""Every optimizer of this package, by the name a configuration uses."""


class Common(TypedDict, total=False):
    """The keyword arguments every optimizer takes besides its own.

    Each also takes `weight_decay` (decoupled) and `shards` (who holds the rest of the model).
    """

    clip_grad: float
    """Largest global gradient norm; 0, the default: no clipping."""
    pull: float
    """Strength gamma of RecAdam's pull towards the weights of the start; 0, the default: no pull. See `optim.pull`."""
    pull_k: float
    pull_t0: float
    main_weights: bool
    """Keep a float32 copy of each bfloat16 parameter (state "main"), and update that; False when not given."""
    kernels: Mode
    """"auto", the default: compiled kernels where they are live (`kernels.library`); "reference": plain torch."""


@dataclass(frozen=True, slots=True)
class ParamUpdate:
    """A parameter (or a shard of one) that this step updates, with its gradient and its group."""

    param: Tensor
    grad: Tensor
    group: Group
    row: int
    """Its row in the table of the whole model."""


class ReplayOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose tensors may be shards, with clipping and the test for a finite gradient inside.

    A step is one pass over the gradients for their sums, one collective (`shards`), and one pass for the update. The
    parameter group counts `step`, as in apex and Megatron. All other state is per parameter: float32, or float64 for
    float64 parameters.

    bfloat16 parameters are updated in float32 and rounded. Without `main_weights` updates below their resolution are
    lost. With it the parameter is only ever the rounded copy of the state `main`. That state is taken from the
    parameter at its first step; write to `weight(param)` to change it.

    Megatron's wrappers may assign `param_groups` after construction; then call `remember_base`. Groups need `params`,
    `lr` and `weight_decay`; `defaults` give every other setting that a group lacks. A group's `kind` overrides what
    `shards` says its tensors are. Parameters without a gradient are left alone.

    After each `step()` there are `grad_norm` (before clipping), `last_step_ok` and `metrics` (empty after a skipped
    step). `skipped` counts the steps not done because the gradient was not finite. Those leave parameters, state and
    step count untouched on every rank.
    """

    state_keys: tuple[str, ...] = ()
    """Names of the per-parameter state tensors, each of the parameter's shape."""
    reads_momentum = False
    """True where the statistics need `exp_avg` as well as the gradient."""
    prefix = "optimizer"
    """First part of the names of the metrics."""

    def __init__(self, params: ParamsT, defaults: Group, shards: Shards, common: Common) -> None:
        clip_grad = common.get("clip_grad", 0.0)
        check_number("lr", defaults["lr"], at_least=0)
        check_number("weight_decay", defaults["weight_decay"], at_least=0)
        check_number("clip_grad", clip_grad, at_least=0)
        self.pull = Pull(common.get("pull", 0.0), common.get("pull_k", 0.5), common.get("pull_t0", 250.0))
        self.main_weights, self.kernels = common.get("main_weights", False), common.get("kernels", "auto")
        check_mode(self.kernels)
        super().__init__(params, {**defaults, "step": 0})
        self.clip_grad = clip_grad
        self.shards = shards
        self.grad_norm = 0.0
        self.last_step_ok = True
        self.skipped = 0
        self.metrics: dict[str, float] = {}
        self._squares: dict[Tensor, Tensor] = {}  # of each parameter's last direction
        self._restored = (0.0, 0.0)

    def attach(self, shards: Shards) -> None:
        """Take `shards` as the description of who holds the rest of these parameters, from the next step on."""
        self.shards = shards

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            state_dtype(param)
        self._remember(self.param_groups[-1])

    def setting(self, group: Group, key: str) -> Any:
        """A group's own value, or the default where a group was made elsewhere and lacks the key."""
        return group.get(key, self.defaults[key])

    def remember_base(self) -> None:
        """Take the parameters as they are now as the base weights of `pull`; does nothing without a pull."""
        for group in self.param_groups:
            self._remember(group)

    def placed(self) -> tuple[list[Tensor], Placement]:
        """All parameters in order, and their placement; a group's own `kind` overrides what `shards` says."""
        params = [p for group in self.param_groups for p in group["params"]]
        place = self.shards.place(params)
        own = [group.get("kind") for group in self.param_groups for _ in group["params"]]
        if not any(own):
            return params, place
        kinds = list(place.kinds)
        for row, kind in zip(place.rows, own, strict=True):
            if kind:
                check_choice("kind of a parameter group", kind, get_args(Kind))
                kinds[row] = kind
        return params, replace(place, kinds=kinds)

    def _remember(self, group: Group) -> None:
        if self.pull.strength:
            for param in group["params"]:
                weight = self.state.get(param, {}).get("main", param)
                self.state[param]["base"] = weight.detach().to(state_dtype(param), copy=True)

    def _has_main(self, param: Tensor) -> bool:
        return self.main_weights and param.dtype == torch.bfloat16

    def weight(self, param: Tensor) -> Tensor:
        """The tensor to update: a bfloat16 parameter's float32 main weights where they are kept, else the parameter.

        Main weights are contiguous.
        """
        if not self._has_main(param):
            return param
        state: dict[str, Tensor] = self.state[param]
        if "main" not in state:
            state["main"] = param.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return state["main"]

    def round_main_weights(self, param: Tensor) -> None:
        """Round the main weights into the parameter, where they are kept; call it after they were updated."""
        if self._has_main(param):
            param.copy_(self.weight(param))

    def init_state(self) -> None:
        """Give every parameter empty state and every group a step count, as loading a checkpoint in place needs."""
        for group in self.param_groups:
            group["step"] = steps_of(group)
        params, place = self.placed()
        for param, row in zip(params, place.rows, strict=True):
            self.state_of(param, self.keys_of(place.kinds[row]))
            self.weight(param)

    @classmethod
    def keys_of(cls, kind: Kind) -> tuple[str, ...]:
        """Names of the state tensors that a parameter of this kind has."""
        return cls.state_keys

    def state_of(self, param: Tensor, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
        """This parameter's state tensors of these keys (`state_keys` by default), zeros where it has none yet."""
        state: dict[str, Tensor] = self.state[param]
        for key in self.state_keys if keys is None else keys:
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
        params, place = self.placed()
        sums = self.shards.sum(self._table(params, place)).cpu()
        self.grad_norm = math.sqrt(float(sums[:, 2].sum()))
        self.last_step_ok = math.isfinite(self.grad_norm)
        self.metrics = {}
        if self.last_step_ok:
            self.metrics = update_rms_metric(self.prefix, *self._summed_squares(sums))
            self.plan(sums, place, clip_factor(self.grad_norm, self.clip_grad))
            updates = self._updates(place)
            if self.pull.strength:
                self._pull(updates)
            # only now: a skipped step keeps what the step before recorded
            self._squares.clear()
            self._restored = (0.0, 0.0)
            self.apply(updates, place)
        else:
            self.skipped += 1
        return loss

    def _pull(self, updates: Sequence[ParamUpdate]) -> None:
        for update in updates:
            weight, base = self.weight(update.param), self.state[update.param]["base"]
            self.pull.towards(weight, base, step=update.group["step"], lr=float(update.group["lr"]))

    @abstractmethod
    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        """Decide what `apply` will do.

        `sums` [rows, COLUMNS] is the summed table (float64, cpu), `scale` the clipping factor.
        """

    def apply(self, updates: Sequence[ParamUpdate], place: Placement) -> None:
        """Update the parameters, in place; `group["step"]` counts this step already."""
        for update in updates:
            self.record_squares(update.param, self.update_param(update))

    @abstractmethod
    def update_param(self, update: ParamUpdate) -> Tensor:
        """Update one parameter, in place.

        Returns the sum of squares [] float64 of its direction (the step by lr, without decay).
        """

    def record_squares(self, param: Tensor, squares: Tensor) -> None:
        """Record the sum of squares of a parameter's direction; the next step's table takes it to all ranks."""
        self._squares[param] = squares

    def rate(self, group: Group) -> float:
        """The learning rate of the optimizer's own step, which a `pull` shortens."""
        return float(group["lr"]) * self.pull.task_weight(group["step"])

    def update_rms_sums(self) -> tuple[float, float]:
        """Sum of squares and number of elements of the last step's direction, over all ranks.

        It is for a checkpoint. Every rank must call it.
        """
        return self._summed_squares(self.shards.sum(self._table(*self.placed())).cpu())

    def restore_update_rms(self, squares: float, elements: float) -> None:
        """Restore the numbers that `update_rms_sums` gave when the run that goes on here was saved."""
        self._restored = (squares, elements)

    def _summed_squares(self, sums: Tensor) -> tuple[float, float]:
        squares, elements = float(sums[:, 3].sum()), float(sums[:, 4].sum())
        return (squares, elements) if elements else self._restored

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
                raise CheckpointError(
                    f"parameters of one group have taken {sorted(counts)} steps; one count a group is supported"
                )
            group["step"] = counts.pop() if counts else steps_of(group)

    def _restore(self, param: Tensor, values: dict[str, Any]) -> None:
        # torch has cast the state to the parameter's dtype, which loses bits for bfloat16: take the saved values again
        state = self.state[param] if values else {}
        foreign = {"step"}
        if not self._has_main(param):
            foreign.add("main")  # it would grow old
        for name in foreign:
            state.pop(name, None)
        for name, value in values.items():
            if name not in foreign and isinstance(value, Tensor):
                state[name] = value.to(param.device, state_dtype(param)).contiguous()

    def _table(self, params: Sequence[Tensor], place: Placement) -> Tensor:
        """This rank's part of the table of sums [rows, COLUMNS], float64 on the cpu."""
        held = [(p, row) for p, row, counted in zip(params, place.rows, place.counted, strict=True) if counted]
        table = torch.zeros(len(place.layers), len(COLUMNS), dtype=torch.float64)

        def add(columns: Tensor, rows: list[int], values: Tensor) -> None:
            columns.index_add_(0, torch.tensor(rows), values.cpu())

        moving = [(p, _dense(p.grad), row) for p, row in held if p.grad is not None]
        if moving:
            momenta = [self.state.get(p, {}).get("exp_avg") if self.reads_momentum else None for p, _, _ in moving]
            sums = sums_of_each([grad for _, grad, _ in moving], momenta, mode=self.kernels)
            add(table[:, :3], [row for _, _, row in moving], sums)
        moved = [(self._squares[p], p.numel(), row) for p, row in held if p in self._squares]
        if moved:
            trace = torch.stack([torch.stack([squares, torch.full_like(squares, n)]) for squares, n, _ in moved])
            add(table[:, 3:], [row for _, _, row in moved], trace)
        return table

    def _updates(self, place: Placement) -> list[ParamUpdate]:
        updates = []
        rows = iter(place.rows)
        for group in self.param_groups:
            group["step"] = steps_of(group) + 1
            for param, row in zip(group["params"], itertools.islice(rows, len(group["params"])), strict=True):
                if param.grad is not None:
                    updates.append(ParamUpdate(param, param.grad, group, row))
        return updates


def update_rms_metric(prefix: str, squares: float, elements: float) -> dict[str, float]:
    """Root mean square of the direction of the step before, which is lr times as long; empty where there was none."""
    return {f"{prefix}/update_rms": math.sqrt(squares / elements)} if elements else {}


def steps_of(group: Group) -> int:
    """Number of steps a group has taken.

    A group made by another optimizer may have no count, or None, or a tensor.
    """
    return int(group.get("step") or 0)


def state_dtype(param: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for float32 and bfloat16.

    Raises ConfigError for others, float16 above all.
    """
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
            f"a gradient of shape {tuple(grad.shape)} is {grad.layout}; only dense ones are supported (Embedding: "
            "sparse=False)"
        )
    return grad
