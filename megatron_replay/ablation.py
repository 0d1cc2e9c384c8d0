"""A comparison of recipes: which runs it has, and the configuration of each.

Nothing is started here; `ablate` does that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_replay.config import RunConfig, build
from megatron_replay.config_file import nested, over
from megatron_replay.errors import ConfigError
from megatron_replay.registry import nearest

BASE = "base"
"""The name of the model before any training, among the recipes."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Keys over those that all runs share, nested or dotted (`optimizer.name: adamw`)."""

    rates: tuple[float, ...] = ()
    """Learning rates of this recipe; when unset, those of the comparison."""
    keys: dict[str, Any] = field(default_factory=dict, metadata={"rest": True})


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Recipes x learning rates x seeds over one common configuration."""

    run: dict[str, Any] = field(default_factory=dict)
    """The keys that all runs share: those of any verb's configuration."""
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """By name. The first is what the others are compared with."""
    rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order of the data. Stores and texts are collected once, with the seed of `run`."""
    gain: str = "targets.nll"
    """The measure of what is learnt, by its name in the result of `evaluate`; a number that falls."""
    forgetting: tuple[str, ...] = ("text.nll",)
    """The measures of what is forgotten; numbers that rise, such as `text.wikitext.nll`."""
    output: str = "runs/ablate"

    def arms(self) -> list[Arm]:
        """All runs, seed by seed. Raises ConfigError where there are none, or a recipe's keys make no configuration."""
        self._check()
        names = self.recipes.items()
        return [
            Arm(name, rate, seed, self._config(name, {"optimizer": {"lr": rate}, "seed": seed}))
            for seed in self.seeds
            for name, recipe in names
            for rate in recipe.rates or self.rates
        ]

    def arm(self, name: str) -> Arm:
        """The run of this name, or the untrained model's. Raises ConfigError for an unknown one."""
        if name == BASE:
            return Arm(BASE, 0.0, 0, build(RunConfig, nested(self.run)))
        found = {arm.name: arm for arm in self.arms()}
        if name not in found:
            raise ConfigError(f"unknown run {name!r}; {nearest(name, list(found))}")
        return found[name]

    def _check(self) -> None:
        if not self.recipes:
            raise ConfigError("recipes is empty; name at least one, such as `adamw: {optimizer.name: adamw}`")
        if BASE in self.recipes:
            raise ConfigError(f"recipes.{BASE}: this name is the untrained model's; choose another")
        for name, recipe in self.recipes.items():
            if not (recipe.rates or self.rates):
                raise ConfigError(f"recipes.{name}: no rates; set rates=[1e-5, ...], for all recipes or in this one")
        if not self.seeds:
            raise ConfigError("seeds is empty; give at least one")

    def _config(self, name: str, last: Mapping[str, Any]) -> RunConfig:
        tree = over(over(nested(self.run), nested(self.recipes[name].keys)), last)
        try:
            return build(RunConfig, tree)
        except ConfigError as err:
            raise ConfigError(f"recipes.{name}: {err}") from err


@dataclass(frozen=True)
class Arm:
    """One run of a comparison."""

    recipe: str
    rate: float
    seed: int
    config: RunConfig
    identity: str = ""
    """A digest of the settings, once the run has its place: a run that is done with another is done again."""

    @property
    def name(self) -> str:
        """The name of the run, which is a folder's too."""
        return self.recipe if self.recipe == BASE else f"{self.recipe}/lr{self.rate:g}/seed{self.seed}"


def digest(values: Any) -> str:
    """The first 12 hex digits of the sha256 of some plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
