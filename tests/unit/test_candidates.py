"""A rule that cannot be is not made, and every layer's record has the columns of the one record."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_replay.candidates import CandidateRule, SetRecord
from megatron_replay.config import Collect
from megatron_replay.errors import ConfigError
from megatron_replay.ops import CandidateSets
from megatron_replay.store import SampleSets


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tau": 0.0}, "tau is a probability mass in (0, 1], got 0.0"),
        ({"tau": float("nan")}, "tau is a probability mass in (0, 1], got nan"),
        ({"k_max": 0}, "k_max must be at least 1, got 0"),
        ({"min_set_size": 0}, "min_set_size must lie in 1..k_max (200), got 0"),
        ({"k_max": 3, "min_set_size": 4}, "min_set_size must lie in 1..k_max (3), got 4"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CandidateRule(**wrong)
    assert str(caught.value) == says


def test_the_settings_of_collect_are_a_rule() -> None:
    assert Collect().rule() == CandidateRule()
    rule = Collect(tau=0.5, k_max=7, min_set_size=1).rule((2, 3))
    assert dataclasses.asdict(rule) == {"tau": 0.5, "k_max": 7, "min_set_size": 1, "always": (2, 3)}


def test_every_record_has_the_same_columns() -> None:
    shared = SetRecord.dtypes()
    assert CandidateSets.dtypes() == shared
    assert SampleSets.dtypes() == {**shared, "positions": "int32", "gold_appended": "bool"}
