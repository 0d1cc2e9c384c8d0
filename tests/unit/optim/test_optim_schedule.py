"""The learning rate, against Megatron's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_replay.errors import ConfigError
from megatron_replay.optim import learning_rate


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_the_same_bits_as_megatron(style: str, warmup: int) -> None:
    scheduler = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    groups = SimpleNamespace(param_groups=[{}])
    theirs = scheduler.OptimizerParamScheduler(
        groups, 0.0, 1.25e-6, 1.25e-7, warmup, 40, style, 0.1, 0.1, 40, "constant"
    )
    for step in range(45):
        ours = learning_rate(step, peak=1.25e-6, minimum=1.25e-7, warmup=warmup, total=40, style=style)
        assert ours == groups.param_groups[0]["lr"], step
        theirs.step(1)


def test_landmarks() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, peak=1.0, minimum=0.1, warmup=10, total=110)

    assert [rate(0), rate(5), rate(10), rate(110), rate(500)] == [0.0, 0.5, 1.0, 0.1, 0.1]
    assert rate(60) == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "cosin"}, "did you mean 'cosine'?"),
        ({"warmup": 10}, "got 10 of 10 steps"),
        ({"warmup": -1}, "warm-up"),
        ({"minimum": 2.0}, r"0..1.0 \(the peak\), got 2.0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate(1, **{"peak": 1.0, "minimum": 0.1, "warmup": 0, "total": 10, **options})
