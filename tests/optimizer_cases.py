"""Every optimizer of the registry, ready for a test: one that is registered is in all of these tests at once.

All that an optimizer needs for its tests is said here: options, further forms, and the tests it is exempt from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim.optimizer import ParamsT

from megatron_replay.config import Optimizer
from megatron_replay.optim import OPTIMIZERS, Muon, MuonClip, ObservedLogits, ReplayOptimizer, build_optimizer


@dataclass(frozen=True, kw_only=True)
class Case:
    """An optimizer with its options; call it with parameters to make one."""

    name: str
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    clip_grad: float = 1.0

    def __call__(self, params: ParamsT, **others: Any) -> ReplayOptimizer:
        if self.kind is MuonClip and self.options.get("variant", "qk") == "qk":
            others = {"logits": ObservedLogits([], 1), **others}
        return build_optimizer(self.name, params, self.lr, **{"clip_grad": self.clip_grad, **self.options, **others})

    @property
    def kind(self) -> type[ReplayOptimizer]:
        return OPTIMIZERS.get(self.name)

    @property
    def config(self) -> Optimizer:
        """The same as a section of a run's configuration."""
        return Optimizer(name=self.name, lr=self.lr, clip_grad=self.clip_grad, options=dict(self.options))


OPTIONS: dict[str, dict[str, Any]] = {
    "mofo": {"fraction": 0.3},
    "tam": {"scope": "layer"},
    "muonclip": {"threshold": 0.05},  # the logits of a tiny model are small
}
"""Options of an optimizer whose defaults would leave part of its rule untested."""

RATE = {"tam": 0.1}
"""Times the rate of the others: TAM's momentum lacks the factor 1 - beta1, so its steps are longer."""

BY_SHAPE = frozenset({"mofo", "muon", "adamuon", "muonclip"})
"""The cases that do something else to a matrix than to a flat view of it."""

BY_MATRIX = frozenset(name for name in OPTIMIZERS if issubclass(OPTIMIZERS.get(name), Muon))
"""The cases that need whole matrices."""

WHOLE_MODEL = frozenset({"muonclip"})
"""The cases that refuse a model of which some weights are frozen."""


def registered(lr: float, *, without: Collection[str] = ()) -> dict[str, Case]:
    """Each optimizer of the registry, by name, but for the exempt ones."""
    names = [name for name in OPTIMIZERS if name not in without]
    return {name: Case(name=name, lr=lr * RATE.get(name, 1.0), options=OPTIONS.get(name, {})) for name in names}


def further(lr: float) -> dict[str, Case]:
    """Further forms of some optimizers, where one set of options does not reach all of a rule."""
    return {
        "moclip-eps": Case(name="moclip", lr=lr, options={"eps": 1e-8, "scope": "layer"}),
        "tam-paper": Case(name="tam", lr=lr, options={"variant": "paper", "scope": "global"}),
        "adamw-pull": pulled("adamw", lr),
    }


def pulled(name: str, lr: float) -> Case:
    """An optimizer with RecAdam's pull, strong enough to be seen in a few steps of this rate."""
    return Case(name=name, lr=lr, options={"pull": 0.005 / lr, "pull_k": 1.0, "pull_t0": 2.0})
