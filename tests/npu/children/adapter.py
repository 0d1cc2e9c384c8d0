"""The adapter that the probe chooses for the NPU, and what importing it saw.

Arguments are left for the adapter to be kept away from.
"""

from __future__ import annotations

import json
import sys
import types

from megatron_replay.device import CPU, NPU
from megatron_replay.errors import DeviceError
from megatron_replay.parallel import shims

before = list(sys.argv)
chosen, notes = shims.adapter(NPU)
imported_by_probe = [
    name for name in ("mindspeed", "megatron_adaptor", "megatron.core", "torch_npu") if name in sys.modules
]
if "import-megatron-first" in sys.argv:
    import megatron.core  # noqa: F401
installed, error = [], ""
try:
    if "install" in sys.argv:
        installed = shims.install(NPU)
except DeviceError as err:
    error = str(err)
fakes = [
    vars(module)
    for module in sys.modules.values()
    if isinstance(module, types.ModuleType) and "IS_A_FAKE" in vars(module)
]
print(
    json.dumps(
        {
            "chosen": chosen.name,
            "notes": notes,
            "on_cpu": shims.adapter(CPU)[0].name,
            "imported_by_probe": imported_by_probe,
            "installed": installed,
            "saw": [
                {"name": fake["__name__"], "argv": fake["ARGV"], "megatron_was_there": fake["MEGATRON_WAS_THERE"]}
                for fake in fakes
            ],
            "argv_restored": sys.argv == before,
            "error": error,
        }
    )
)
