"""Windows of a text for perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_replay.errors import DataError


def windows(
    ids: Sequence[int] | NDArray[np.integer], window: int, tokens: int | None = None
) -> list[NDArray[np.int32]]:
    """The first `tokens` ids cut into windows of `window` ids that do not overlap; each predicts all but its first.

    The last window may be shorter; a single id left over is dropped, as it predicts nothing. Raises DataError when
    nothing is predicted.
    """
    kept = np.asarray(ids, dtype=np.int32)[:tokens]
    if window < 2 or len(kept) < 2:
        raise DataError(
            f"perplexity needs at least 2 tokens in the text and in a window, got {len(kept)} and {window}; give a "
            "longer text or window"
        )
    parts = [kept[i : i + window] for i in range(0, len(kept), window)]
    return [part for part in parts if len(part) > 1]
