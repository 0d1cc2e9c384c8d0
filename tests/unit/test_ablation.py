"""The runs of a comparison: how keys are laid over each other, and what a run is called."""

from __future__ import annotations

import pytest

from megatron_replay.ablation import Ablation, Recipe
from megatron_replay.config import RunConfig, build
from megatron_replay.config_file import changed, nested, over
from megatron_replay.errors import ConfigError


def test_dotted_and_nested_keys_are_one() -> None:
    assert nested({"a.b": 1, "a": {"c.d": 2}, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_the_upper_keys_win() -> None:
    below = {"a": {"b": 1, "c": 2}, "d": 3}
    assert over(below, {"a": {"b": 9}, "e": {"f": 1}}) == {"a": {"b": 9, "c": 2}, "d": 3, "e": {"f": 1}}
    assert over({"a": "text"}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert below == {"a": {"b": 1, "c": 2}, "d": 3}


def test_changed_keys_are_those_that_differ() -> None:
    config = build(RunConfig, {"seed": 3, "optimizer": {"name": "tam", "variant": "paper"}, "train": {"loss": "full"}})
    tree = changed(config)
    assert tree == {"seed": 3, "optimizer": {"name": "tam", "variant": "paper"}, "train": {"loss": "full"}}
    assert build(RunConfig, tree) == config
    assert changed(RunConfig()) == {}


def ablation() -> Ablation:
    return Ablation(
        run={"model": "m", "optimizer.name": "adamw"},
        recipes={"plain": Recipe(), "tam": Recipe(rates=(5e-4,), keys={"optimizer.name": "tam", "train.loss": "full"})},
        rates=(1e-4, 2e-4),
        seeds=(1, 2),
    )


def test_every_recipe_at_each_rate_with_each_seed() -> None:
    arms = ablation().arms()
    assert [arm.name for arm in arms] == [
        *("plain/lr0.0001/seed1", "plain/lr0.0002/seed1", "tam/lr0.0005/seed1"),
        *("plain/lr0.0001/seed2", "plain/lr0.0002/seed2", "tam/lr0.0005/seed2"),
    ]
    tam = arms[2].config
    assert (tam.model, tam.optimizer.name, tam.optimizer.lr, tam.seed, tam.train.loss) == ("m", "tam", 5e-4, 1, "full")
    assert arms[0].config.optimizer.name == "adamw"


def test_a_run_by_its_name() -> None:
    assert ablation().arm("tam/lr0.0005/seed2").config.seed == 2
    assert ablation().arm("base").config.model == "m"
    with pytest.raises(ConfigError, match=r"unknown run 'tam/lr0\.0005/seed3'; did you mean 'tam/lr0\.0005/seed"):
        ablation().arm("tam/lr0.0005/seed3")
