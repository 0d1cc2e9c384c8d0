"""The changes we make to megatron-core's surroundings, one table entry each, and the checks of its version.

Importing this package changes nothing. `install` makes the changes, once per process, and only processes that run a
model call it.
"""

from __future__ import annotations

from megatron_replay.parallel.shims.adapters import DeviceAdapter, adapter
from megatron_replay.parallel.shims.entries import Shim, catalog, table
from megatron_replay.parallel.shims.installation import import_megatron, install
from megatron_replay.parallel.shims.versions import megatron_version, within

__all__ = [
    "DeviceAdapter",
    "Shim",
    "adapter",
    "catalog",
    "import_megatron",
    "install",
    "megatron_version",
    "table",
    "within",
]
