"""A checkpoint from elsewhere must not run code: its pickles are looked through before anybody loads them.

`.metadata` is a pickle that torch and megatron-core load without restraint. Here it goes through an unpickler that
knows the classes such a file needs and no others.

The objects beside the tensors in the .distcp files (megatron's `_extra_state`) are loaded without restraint too:
torch's load planner calls torch.load(weights_only=False) on them. Here they go through torch.load(weights_only=True).
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_replay.errors import CheckpointError

METADATA = ".metadata"
COMMON = "common.pt"


class Placeholder:
    """Stands for the plan that megatron-core 0.15 put into its metadata."""


class MegatronMetadata(Metadata):
    """Stands for the metadata of megatron-core 0.15: torch's, and fields of its own that nothing here reads."""


_CLASSES: tuple[Any, ...] = (
    torch.Size,
    torch.serialization._get_layout,
    filesystem._StorageInfo,
    filesystem._StoragePrefix,
    metadata.BytesStorageMetadata,
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    planner.BytesIOWriteData,
    planner.SavePlan,
    planner.TensorWriteData,
    planner.WriteItem,
    planner.WriteItemType,
)
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__name__): known for known in _CLASSES},
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    (_MEGATRON, "MCoreMetadata"): MegatronMetadata,
    (_MEGATRON, "MCoreSavePlan"): Placeholder,
}


class _CodeRefused(Exception):
    """The name of what a pickle wanted to call."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get((module, name))
        if known is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            known = getattr(torch, name)
        if known is None:
            raise _CodeRefused(f"{module}.{name}")
        return known


def read_metadata(folder: Path) -> Metadata:
    """The `.metadata` of an iteration folder, by an unpickler that runs nothing.

    Raises CheckpointError for a file that is missing, damaged, would run code, or points outside its folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            found = _Restricted(file).load()
    except _CodeRefused as err:
        raise CheckpointError(f"{path}: loading it would run code: it names {err}; do not use this checkpoint") from err
    except FileNotFoundError as err:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, use another one") from err
    except Exception as err:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: damaged ({first_line(err)}); use another checkpoint") from err
    if (
        not isinstance(found, Metadata)
        or not isinstance(found.state_dict_metadata, dict)
        or not isinstance(found.storage_data, dict)
    ):
        raise CheckpointError(f"{path}: damaged (not the metadata of a torch_dist checkpoint); use another checkpoint")
    for info in found.storage_data.values():
        name = str(getattr(info, "relative_path", ""))
        if not name or Path(name).name != name:
            raise CheckpointError(
                f"{path}: names the file {name!r}, which is not in its folder; do not use this checkpoint"
            )
    return found


def refuse_code(path: str | Path) -> Any:
    """Raise CheckpointError when loading the iteration folder `path` with megatron-core would run code hidden in it.

    No tensor is read. Returns what common.pt holds, which may be anything.
    """
    folder = Path(path)
    found = read_metadata(folder)
    try:
        common = torch.load(folder / COMMON, map_location="cpu", weights_only=True)
    except Exception as err:
        raise _refusal(folder / COMMON, err) from err
    for index, info in found.storage_data.items():
        if isinstance(found.state_dict_metadata.get(index.fqn), metadata.BytesStorageMetadata):
            _check_object(folder / info.relative_path, index.fqn, info.offset, info.length)
    return common


def _check_object(path: Path, key: str, offset: int, length: int) -> None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            torch.load(io.BytesIO(file.read(length)), map_location="cpu", weights_only=True)
    except Exception as err:
        raise _refusal(path, err, f", object {key!r} at byte {offset}") from err


def _refusal(path: Path, err: Exception, where: str = "") -> CheckpointError:
    if isinstance(err, OSError):
        return CheckpointError(f"{path}{where}: cannot be read: {err.strerror or err}; use another checkpoint")
    named = re.search(r"GLOBAL (\S+)", str(err))  # so torch names what the pickle wanted to call
    if isinstance(err, pickle.UnpicklingError) and named:
        return CheckpointError(
            f"{path}{where}: loading it would run code: it names {named[1]}; do not use this checkpoint"
        )
    return CheckpointError(f"{path}{where}: damaged ({first_line(err)}); use another checkpoint")


def first_line(err: BaseException) -> str:
    """An exception in a sentence."""
    text = str(err).strip().splitlines()
    return text[0].split(". ")[0].strip().rstrip(".") if text else type(err).__name__
