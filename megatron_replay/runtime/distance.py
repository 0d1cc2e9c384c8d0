"""The distance of a model from its base, as `evaluate` measures it."""

from __future__ import annotations

import math
from typing import Any

from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.parallel.mcore.model import squared_distance
from megatron_replay.runtime.session import Session


def distance(session: Session) -> dict[str, Any]:
    """|theta - theta_0| / |theta_0| over all parameters, theta_0 the base model's."""
    moved, size = squared_distance(session.model, HFFolder(session.config.evaluate.base))
    return {"relative_l2": math.sqrt(moved / size)}
