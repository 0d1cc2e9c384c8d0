"""The losses of Stage 1, one a file: each is an object that gives its needs, its values and its memory.

A new loss is a new file here with a class under `@LOSSES.register("its name")`. Every file of this package is imported
with it, so nothing else has to name the loss. `train.loss` takes it, and so do the memory prediction and the log.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from megatron_replay.parallel.losses.interface import LOSSES, Loss

__all__ = ["LOSSES", "Loss"]

_FILES = [import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
