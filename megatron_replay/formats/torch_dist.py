"""megatron-core's `torch_dist` checkpoints, read and written without a process group, one tensor in memory at a time.

A checkpoint of ours is a folder ROOT: latest_checkpointed_iteration.txt, iter_0000100/ (tensors), hf/ (configuration,
tokenizer, source.json). An iteration folder is what megatron.core.dist_checkpointing writes:
- `.metadata` says which key has which shape, in which chunks, and where each chunk lies.
- `__0_0.distcp` and its like hold the chunks, torch.save blobs one after the other.
- `common.pt` holds plain values.
- `metadata.json` is written last.

The layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [L, rows, columns]. The run that wrote it cut it:
pipeline ranks along L, tensor ranks along rows or columns. Loading cuts anew, so one writer serves every layout, and
one reader every writer. A tied output layer is not stored.

The blobs are written by hand. torch's FileSystemWriter keeps the last tensor of every key until its file is complete
(2.13). That is twice the largest tensor, and more where the output layer is not tied.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_replay.errors import CheckpointError
from megatron_replay.formats.untrusted import COMMON, METADATA, first_line, read_metadata, refuse_code
from megatron_replay.models.lora import A, B, merged
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import Weight, restripe

__all__ = ["LATEST", "Reader", "is_checkpoint", "iteration_name", "refuse_code", "resolve", "write_model"]

LATEST = "latest_checkpointed_iteration.txt"
ITERATIONS = "iter_[0-9]*"
FINISHED = "metadata.json"
"""megatron writes it last; without it a save was interrupted."""
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
RENAMED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Local name of a norm -> the key that stores it, which is that of transformer-engine's fused layers.

So checkpoints of both kinds of layers read the same.
"""
STATEFUL = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""Modules of a layer that also store an (empty) `_extra_state`, which megatron's load asks for."""


def iteration_name(iteration: int) -> str:
    """Folder of an iteration, as megatron names it."""
    return f"iter_{iteration:07d}"


def is_checkpoint(path: str | Path) -> bool:
    """True for a checkpoint folder (finished or not): ROOT, or one of its iterations."""
    folder = Path(path)
    if (folder / LATEST).is_file() or (folder / METADATA).is_file() or any(folder.glob(ITERATIONS)):
        return True
    return folder.is_dir() and folder.match(ITERATIONS)


def resolve(path: str | Path) -> Path:
    """The iteration folder: ROOT's latest, or the folder itself.

    CheckpointError when it is missing, unfinished or of another format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: no such folder; give a checkpoint folder (with {LATEST}) or one of its iterations"
        )
    if (folder / LATEST).is_file():
        text = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if not text.isdecimal():
            raise CheckpointError(
                f"{folder / LATEST}: expected the number of an iteration, got {text[:20]!r}; write it by hand, e.g. 100"
            )
        folder = folder / iteration_name(int(text))
    elif any(folder.glob(ITERATIONS)):
        raise CheckpointError(
            f"{folder}: no {LATEST}, so no save was finished; give one of its iterations or train again"
        )
    missing = next((name for name in (FINISHED, METADATA, COMMON) if not (folder / name).is_file()), None)
    if missing:
        raise CheckpointError(
            f"{folder}: {missing} is missing: no checkpoint, or its save was interrupted; use an earlier iteration"
        )
    _check_format(folder / FINISHED)
    return folder


def write_model(
    path: str | Path, table: WeightTable, tensors: Callable[[Weight], Tensor], *, dtype: torch.dtype
) -> None:
    """Write the iteration folder `path` for any layout.

    `tensors(weight)` gives each whole megatron tensor [weight.shape], in the order of the table. Memory: what `tensors`
    holds, and a copy of a tensor whose storage is shared. CheckpointError for another shape or dtype, or a full disk.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    need, free = table.numel * dtype.itemsize, shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(f"{folder}: the weights need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    found = Metadata(state_dict_metadata={}, storage_data={})
    with (folder / "__0_0.distcp").open("wb") as out:
        for weight in table:
            _write_tensor(out, found, weight, tensors(weight), dtype)
        layers = table.spec.num_layers
        for layer in range(layers):
            for module in STATEFUL:
                key = f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}"
                found.state_dict_metadata[key] = BytesStorageMetadata()
                found.storage_data[MetadataIndex(key)] = _append(out, [None])
        _sync(out)
    with (folder / COMMON).open("wb") as out:
        torch.save({}, out)
        _sync(out)
    with (folder / METADATA).open("wb") as out:
        pickle.dump(found, out)
        _sync(out)
    with (folder / FINISHED).open("wb") as out:
        out.write(json.dumps(FORMAT).encode())
        _sync(out)


class Reader:
    """The model in a checkpoint, whatever layout wrote it, tensor by tensor; optimizer state is skipped.

    CheckpointError on opening: missing, unfinished, damaged, or holding a pickle that would run code.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = resolve(path)
        common = refuse_code(self.folder)
        self._metadata = read_metadata(self.folder)
        progress = common.get("progress") if isinstance(common, dict) else None
        self.striped = isinstance(progress, dict) and bool(progress.get("striped"))
        """True where the vocabulary's rows are stored in stripes, as the run that wrote them held them."""

    def keys(self) -> list[str]:
        """Keys of the tensors, sorted; those of the layers are stacked."""
        return sorted(
            key for key, entry in self._metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
        )

    def has_adapter(self) -> bool:
        """True where factors stand beside the model's matrices."""
        return any(key.startswith("decoder.layers.") and key.endswith((f".{A}", f".{B}")) for key in self.keys())

    def dtype(self, weight: Weight) -> torch.dtype:
        """Stored type of a tensor."""
        stored: torch.dtype = self._entry(weight).properties.dtype
        return stored

    def check(self, weights: Iterable[Weight]) -> None:
        """Check by the metadata alone that each of the tensors is there and in its shape.

        CheckpointError names the first that is not.
        """
        for weight in weights:
            self._entry(weight)

    def read(self, weight: Weight) -> Tensor:
        """One whole megatron tensor [weight.shape], rows as `weight` has them.

        Memory: the tensor, and one chunk of it where it was written in several, or a copy where its rows are stored in
        another order. CheckpointError when it is missing, misshapen or damaged.
        """
        whole = self._read(weight)
        other_order = weight.kind == "vocab" and weight.striped != self.striped
        return restripe(whole, striped=weight.striped) if other_order else whole

    def _read(self, weight: Weight) -> Tensor:
        """The tensor as it is stored."""
        entry = self._entry(weight)
        key, size, offset = _place(weight)
        wanted = tuple(1 for _ in range(len(size) - len(weight.shape))) + weight.shape
        whole: Tensor | None = None
        filled = 0
        for chunk in entry.chunks:
            cut = _overlap(offset, wanted, tuple(chunk.offsets), tuple(chunk.sizes))
            if cut is None:
                continue
            if tuple(chunk.offsets) == offset and tuple(chunk.sizes) == wanted:
                return self._chunk(key, chunk, entry.properties.dtype).view(weight.shape)
            whole = torch.empty(wanted, dtype=entry.properties.dtype) if whole is None else whole
            part = whole[cut[0]]
            part.copy_(self._chunk(key, chunk, entry.properties.dtype)[cut[1]])
            filled += part.numel()
        if whole is None or filled != whole.numel():
            where = f"{self.folder / METADATA}: tensor {key!r} at {list(offset)}"
            raise CheckpointError(
                f"{where}: its chunks hold {filled} of {math.prod(wanted)} values; use another checkpoint"
            )
        return whole.view(weight.shape)

    def read_merged(self, weight: Weight, table: WeightTable) -> Tensor:
        """`read`, with the factors that the table has beside this tensor added to it."""
        whole = self.read(weight)
        factors = table.factors_of(weight)
        if table.adapter is None or factors is None:
            return whole
        a, b = map(self.read, factors)
        return merged(whole, a, b, table.adapter)

    def _entry(self, weight: Weight) -> Any:
        key, size, _ = _place(weight)
        entry = self._metadata.state_dict_metadata.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{self.folder}: tensor {key!r} {list(size)} is missing; is this checkpoint of another model?"
            )
        if tuple(entry.size) != size:
            hint = "another model, or written with another layout.head_multiple"
            raise CheckpointError(f"{self.folder}: tensor {key!r} is {list(entry.size)}, expected {list(size)}: {hint}")
        return entry

    def _chunk(self, key: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        """A chunk as it was written, its checksum compared; CheckpointError names file and byte."""
        offsets = list(chunk.offsets)
        info = (self._metadata.storage_data or {}).get(MetadataIndex(key, offsets))
        if info is None:
            raise CheckpointError(
                f"{self.folder / METADATA}: chunk {offsets} of tensor {key!r} lies nowhere; use another checkpoint"
            )
        file = self.folder / info.relative_path
        where = f"{file}: tensor {key!r}, chunk {offsets} at byte {info.offset}"
        try:
            tensor = _load(file, info)
        except FileNotFoundError as err:
            raise CheckpointError(
                f"{where}: the file is missing; copy the checkpoint again or use another one"
            ) from err
        except Exception as err:  # a damaged blob can raise anything
            raise CheckpointError(f"{where}: damaged or truncated ({first_line(err)}); use another checkpoint") from err
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes or tensor.dtype != dtype:
            raise CheckpointError(
                f"{where}: not the {list(chunk.sizes)} {dtype} tensor that {METADATA} names; use another checkpoint"
            )
        return tensor


class _Section(io.RawIOBase):
    """The bytes [offset, offset + length) of a file as a file of their own."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + position < 0:
            raise OSError(f"seek to {base + position}, before the blob's first byte")
        self._at = base + position
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count


def _place(weight: Weight) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """(key, shape of the key's tensor, where this weight begins in it)."""
    start = (0,) * len(weight.shape)
    if weight.layer is None:
        return weight.name, weight.shape, start
    name = weight.name.removeprefix(f"decoder.layers.{weight.layer}.")
    return f"decoder.layers.{RENAMED.get(name, name)}", (weight.num_layers, *weight.shape), (weight.layer, *start)


def _overlap(
    offset: Sequence[int], size: Sequence[int], other: Sequence[int], other_size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The common part of two boxes, as slices of the first and of the second; None when they have none."""
    ours, theirs = [], []
    for a, n, b, m in zip(offset, size, other, other_size, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        ours.append(slice(low - a, high - a))
        theirs.append(slice(low - b, high - b))
    return tuple(ours), tuple(theirs)


def _write_tensor(out: Any, found: Metadata, weight: Weight, whole: Tensor, dtype: torch.dtype) -> None:
    """Append one tensor as one chunk and note its position."""
    if tuple(whole.shape) != weight.shape or whole.dtype != dtype:
        raise CheckpointError(
            f"parameter {weight.name!r} is {list(whole.shape)} {whole.dtype}, expected {list(weight.shape)} {dtype}"
        )
    key, size, offset = _place(weight)
    chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size((1,) * (len(size) - len(weight.shape)) + weight.shape))
    if key not in found.state_dict_metadata:
        found.state_dict_metadata[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
    entry: Any = found.state_dict_metadata[key]
    entry.chunks.append(chunk)
    whole = whole.detach().cpu().contiguous()
    if whole.untyped_storage().nbytes() != whole.nbytes:
        whole = whole.clone()  # torch.save writes the whole storage behind a view
    found.storage_data[MetadataIndex(key, offset)] = _append(out, whole.view(chunk.sizes))


def _append(out: Any, value: Any) -> _StorageInfo:
    begin = out.tell()
    try:
        torch.save(value, out)
    except RuntimeError as err:  # so torch ends when the disk refuses; the first cause says it better
        raise err.__context__ if isinstance(err.__context__, OSError) else err from None
    return _StorageInfo(Path(out.name).name, begin, out.tell() - begin)


def _load(file: Path, info: Any) -> Any:
    with file.open("rb") as stream:
        # torch.load compares no checksums
        damaged = zipfile.ZipFile(_Section(stream, info.offset, info.length)).testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
        section: Any = _Section(stream, info.offset, info.length)
        return torch.load(section, map_location="cpu", weights_only=True)


def _sync(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def _check_format(path: Path) -> None:
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (ValueError, KeyError, TypeError) as err:
        raise CheckpointError(f"{path}: damaged ({first_line(err)}); use another checkpoint") from err
    if backend != FORMAT["sharded_backend"]:
        raise CheckpointError(f"{path}: the format {backend!r} is not read; save the checkpoint as torch_dist")
