"""The checks of `train` that need no model: a loss says what it needs, and a run without that is refused."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_replay.config import RunConfig, Train
from megatron_replay.errors import ConfigError
from megatron_replay.parallel.losses import LOSSES, Loss
from megatron_replay.parallel.losses.full import Full
from megatron_replay.parallel.losses.restricted import Restricted
from megatron_replay.runtime.training import _check_logits, check_run


class Soft(Restricted):
    needs_logits = True


def config(**train: str) -> RunConfig:
    return dataclasses.replace(RunConfig(), train=Train(**train))  # type: ignore[arg-type]


def test_the_losses_register_themselves() -> None:
    assert LOSSES.get("full") is Full and LOSSES.get("restricted") is Restricted
    with pytest.raises(ConfigError, match=r"unknown train\.loss 'restrict'; did you mean 'restricted'\?"):
        LOSSES.get("restrict")


def test_a_loss_over_sets_needs_a_store() -> None:
    says = r"train\.loss=restricted needs the candidate store of `collect`: train\.store=PATH \(or .*train\.loss=full\b"
    with pytest.raises(ConfigError, match=says):
        check_run(config(loss="restricted"))


@pytest.mark.parametrize(
    ("kind", "logits", "refused"),
    [(Soft, "none", True), (Soft, "fp16", False), (Restricted, "none", False), (Full, "none", False)],
)
def test_a_loss_of_logits_needs_a_store_with_logits(kind: type[Loss], logits: str, refused: bool) -> None:
    given = config(loss="soft", store="base.store")
    if not refused:
        return _check_logits(given, kind, logits)
    with pytest.raises(ConfigError, match=r"train\.loss=soft needs .* base\.store .* collect\.logits=fp16"):
        _check_logits(given, kind, logits)
