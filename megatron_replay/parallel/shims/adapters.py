"""Adapters, which lead megatron-core's CUDA names to the NPU: choose one and import it.

MindSpeed and MegatronAdaptor count where they are installed and made for this megatron-core. Otherwise torch-npu's own
`transfer_to_npu` serves, with the NPU's part of the table in `entries`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from dataclasses import dataclass

from megatron_replay.device import Device
from megatron_replay.errors import DeviceError
from megatron_replay.parallel.shims.versions import importable_version, minor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceAdapter:
    """A module that leads megatron's CUDA names to the NPU.

    It is imported before megatron.core, of which it replaces parts.
    """

    name: str
    module: str
    package: str = ""
    """Its name for pip, whose version is that of the megatron-core it is made for (0.12.1 of MindSpeed 26.1.0)."""


NONE = DeviceAdapter("none", "torch_npu.contrib.transfer_to_npu")
ADAPTERS = (
    DeviceAdapter("mindspeed", "mindspeed.megatron_adaptor", "mindspeed"),
    DeviceAdapter("megatron_adaptor", "megatron_adaptor", "megatron-adaptor"),
)


def adapter(device: Device) -> tuple[DeviceAdapter, list[str]]:
    """The adapter to use on this device, and a note on each installed adapter that is not used.

    The first of ADAPTERS is chosen whose version begins with the two numbers of the megatron-core that is here. Nothing
    is imported.
    """
    core, chosen, notes = importable_version(), NONE, []
    for candidate in ADAPTERS:
        version = _package_version(candidate)
        unused = f"{candidate.package} {version} is installed and not used"
        if version is None:
            if importlib.util.find_spec(candidate.module.partition(".")[0]) is not None:
                notes.append(
                    f"{candidate.package} is here and not used: pip does not know its version; install it with pip "
                    "install -e"
                )
        elif device.name != "npu" or chosen != NONE:
            notes.append(unused)
        elif core is None or minor(version) != minor(core):
            notes.append(f"{unused}: it is made for megatron-core {version}, here is {core or 'none'}")
        else:
            chosen = candidate
    return chosen, notes


def import_adapter(adapter: DeviceAdapter) -> None:
    """Import the adapter, which must come before megatron.core.

    The command line is hidden meanwhile, because MindSpeed reads options there. Raises DeviceError.
    """
    if "megatron.core" in sys.modules:
        raise DeviceError(
            f"megatron.core was imported before {adapter.module}, which must come first; import megatron_replay first"
        )
    words, sys.argv = sys.argv, sys.argv[:1]
    try:
        importlib.import_module(adapter.module)
    except Exception as err:
        cause = f"{type(err).__name__}: {' '.join(str(err).split())}"
        way_out = "install torch-npu again" if adapter == NONE else f"repair or uninstall {adapter.package}"
        raise DeviceError(f"{adapter.module} cannot be imported ({cause}); {way_out}") from err
    finally:
        sys.argv = words
    log.info("adapter between megatron-core and the NPU: %s", adapter.name)


def _package_version(adapter: DeviceAdapter) -> str | None:
    try:
        return importlib.metadata.version(adapter.package)
    except importlib.metadata.PackageNotFoundError:
        return None
