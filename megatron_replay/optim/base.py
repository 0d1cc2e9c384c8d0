"""What all our optimizers share: statistics, the norm, clipping, skipping, state and its file form.

A rule only says how a parameter moves.
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
from megatron_replay.optim.options import check_choice, check_number
from megatron_replay.optim.pull import Pull
from megatron_replay.optim.shards import Kind, Placement, Shards
from megatron_replay.optim.stats import COLUMNS, clip_factor, sums_of_each
from megatron_replay.registry import Registry

Group = dict[str, Any]

OPTIMIZERS: Registry[ReplayOptimizer] = Registry("optimizer")
"""Every optimizer of this package, by the name a configuration uses."""


class Common(TypedDict, total=False):
    """The keyword arguments every optimizer takes besides its own, `weight_decay` (decoupled) and `shards` (who holds
    the rest)."""

    clip_grad: float
    """Largest global gradient norm; 0, the default: no clipping."""
    pull: float
    """RecAdam's pull towards the weights of the start: its strength gamma; 0, the default: none. See `optim.pull`."""
    pull_k: float
    pull_t0: float
    main_weights: bool
    """Keep a float32 copy of each bfloat16 parameter (state "main"), which is what moves; False when not given."""
    kernels: Mode
    """"auto", the default: compiled kernels where they are live (`kernels.optimizer`); "reference": plain torch."""


@dataclass(frozen=True, slots=True)
class Move:
    """One parameter (or piece of one) that is to move in this step."""

    param: Tensor
    grad: Tensor
    group: Group
    row: int
    """Its row in the table of the whole model."""


class ReplayOptimizer(torch.optim.Optimizer, ABC):
    """A torch optimizer whose tensors may be shards, with clipping and the test for a finite gradient inside.

    A step is one pass over the gradients for their sums, one collective (`shards`), one pass for the update. `step` is
    counted in the parameter group (as apex and Megatron do); the rest of the state is per parameter, float32, or
    float64 for float64 parameters. bfloat16 parameters are updated in float32 and rounded, and without `main_weights`
    updates below their resolution are lost. With it the parameter is only ever the rounded copy of the state `main`,
    taken from it at its first step; write to `weight(param)` to change it. Megatron's wrappers may assign
    `param_groups` after construction (then call `remember_base`); groups need `params`, `lr` and `weight_decay`,
    whatever else is missing is taken from `defaults`. A group's `kind` overrides what `shards` says its tensors are.
    Parameters without a gradient are left alone.

    After each `step()`: `grad_norm` (before clipping), `last_step_ok`, `metrics` (empty after a skipped step);
    `skipped` counts the steps not done because the gradient was not finite. Those leave parameters, state and step
    count untouched on every rank.
    """

    state_keys: tuple[str, ...] = ()
    """Names of the per-parameter state tensors, each of the parameter's shape."""
    reads_momentum = False
    """Whether the statistics need `exp_avg` as well as the gradient."""
    prefix = "optimizer"
    """Of the metrics' names."""

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
        self._travelled: dict[Tensor, Tensor] = {}
        self._carried = (0.0, 0.0)

    def attach(self, shards: Shards) -> None:
        """Say who holds the rest of these parameters; from the next step on."""
        self.shards = shards

    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            state_dtype(param)
        self._remember(self.param_groups[-1])

    def setting(self, group: Group, key: str) -> Any:
        """A group's own value, or the default for groups that were made elsewhere and lack the key."""
        return group.get(key, self.defaults[key])

    def remember_base(self) -> None:
        """Take the parameters as they are for the base weights of `pull`; a no-op without it."""
        for group in self.param_groups:
            self._remember(group)

    def placed(self) -> tuple[list[Tensor], Placement]:
        """All parameters in order, and where they lie; a group's own `kind` goes before what `shards` says."""
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
        """The tensor to move: the float32 main weights of a bfloat16 parameter where they are kept (contiguous), else
        the parameter."""
        if not self._has_main(param):
            return param
        state: dict[str, Tensor] = self.state[param]
        if "main" not in state:
            state["main"] = param.detach().to(torch.float32, memory_format=torch.contiguous_format)
        return state["main"]

    def settle(self, param: Tensor) -> None:
        """Round the main weights, where they are kept, into the parameter: to be called after they moved."""
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
        """This parameter's state tensors, zeros when it has none yet; all of `state_keys` unless told otherwise."""
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
            self.metrics = travel_metrics(self.prefix, *self._last_travel(sums))
            self.plan(sums, place, clip_factor(self.grad_norm, self.clip_grad))
            moves = self._moves(place)
            if self.pull.strength:
                for move in moves:
                    base = self.state[move.param]["base"]
                    self.pull.towards(
                        self.weight(move.param), base, step=move.group["step"], lr=float(move.group["lr"])
                    )
            # not before: a skipped step leaves what the last one noted
            self._travelled.clear()
            self._carried = (0.0, 0.0)
            self.apply(moves, place)
        else:
            self.skipped += 1
        return loss

    @abstractmethod
    def plan(self, sums: Tensor, place: Placement, scale: float) -> None:
        """Decide what `apply` will do: `sums` [rows, COLUMNS] is the summed table (float64, cpu), `scale` the clipping
        factor."""

    def apply(self, moves: Sequence[Move], place: Placement) -> None:
        """Move the parameters, in place; `group["step"]` counts this step already."""
        for move in moves:
            self.travelled(move.param, self.update(move))

    @abstractmethod
    def update(self, move: Move) -> Tensor:
        """Move one parameter, in place; returns the sum of squares [] float64 of its direction (the step by lr, without
        decay)."""

    def travelled(self, param: Tensor, squares: Tensor) -> None:
        """Note how far a parameter went; the next step's table carries it to all ranks."""
        self._travelled[param] = squares

    def rate(self, group: Group) -> float:
        """The learning rate of this step, of which `pull` leaves the task its share."""
        return float(group["lr"]) * self.pull.share(group["step"])

    def travel(self) -> tuple[float, float]:
        """Sum of squares and number of elements of the last step's direction, over all ranks: for a checkpoint. Every
        rank must call it."""
        return self._last_travel(self.shards.sum(self._table(*self.placed())).cpu())

    def carry(self, squares: float, elements: float) -> None:
        """Take what `travel` said when the run that goes on here was saved."""
        self._carried = (squares, elements)

    def _last_travel(self, sums: Tensor) -> tuple[float, float]:
        squares, elements = float(sums[:, 3].sum()), float(sums[:, 4].sum())
        return (squares, elements) if elements else self._carried

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
        held = [(p, row) for p, row, counted in zip(params, place.rows, place.counted, strict=True) if counted]
        table = torch.zeros(len(place.layers), len(COLUMNS), dtype=torch.float64)

        def add(columns: Tensor, rows: list[int], values: Tensor) -> None:
            columns.index_add_(0, torch.tensor(rows), values.cpu())

        moving = [(p, _dense(p.grad), row) for p, row in held if p.grad is not None]
        if moving:
            momenta = [self.state.get(p, {}).get("exp_avg") if self.reads_momentum else None for p, _, _ in moving]
            sums = sums_of_each([grad for _, grad, _ in moving], momenta, mode=self.kernels)
            add(table[:, :3], [row for _, _, row in moving], sums)
        moved = [(p, row) for p, row in held if p in self._travelled]
        if moved:
            trace = [
                torch.stack([self._travelled[p], torch.full_like(self._travelled[p], p.numel())]) for p, _ in moved
            ]
            add(table[:, 3:], [row for _, row in moved], torch.stack(trace))
        return table

    def _moves(self, place: Placement) -> list[Move]:
        moves = []
        rows = iter(place.rows)
        for group in self.param_groups:
            group["step"] = steps_of(group) + 1
            for param, row in zip(group["params"], itertools.islice(rows, len(group["params"])), strict=True):
                if param.grad is not None:
                    moves.append(Move(param, param.grad, group, row))
        return moves


def travel_metrics(prefix: str, squares: float, elements: float) -> dict[str, float]:
    """Root mean square of the direction of the step before (the step's length is lr times this); empty where there was
    none."""
    return {f"{prefix}/update_rms": math.sqrt(squares / elements)} if elements else {}


def steps_of(group: Group) -> int:
    """Steps a group has taken; groups made by other optimizers may have no count, or None, or a tensor."""
    return int(group.get("step") or 0)


def state_dtype(param: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for float32 and bfloat16; raises ConfigError for others, float16 above
    all."""
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
