"""Writes a Hugging Face folder, one tensor at a time.

safetensors' own writer wants every tensor of a file at once. The format is simple enough to write by hand:
- 8 bytes: the header's length, little-endian;
- a JSON header {name: {dtype, shape, data_offsets}}, padded with spaces to 8 bytes;
- the tensors' bytes.

Names and shapes follow from `models.weight_table`. So the headers are written first, and tensors come in any order.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from megatron_replay.errors import CheckpointError
from megatron_replay.formats.hf_folder import DTYPES, INDEX, SINGLE
from megatron_replay.models.spec import ModelSpec, read_config
from megatron_replay.models.weight_table import WeightTable

SHARD_BYTES = 5 << 30
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
SIDE_FOLDERS = ("additional_chat_templates",)
"""Folders that belong to a tokenizer; other folders of a model repository hold other formats of the weights."""


class HFWriter:
    """Write a folder that transformers loads.

        with HFWriter(path, spec) as out:
            out.add(name, tensor) ...
            out.copy_side_files(source)

    Everything goes to a sibling folder that takes the target's name when the block ends without an error. Otherwise
    nothing stays behind. Memory: the tensor being added.

    CheckpointError: the target is not empty, the disk is too small, or a tensor is unknown, misshapen, of another dtype
    or never added.
    """

    def __init__(
        self, path: str | Path, spec: ModelSpec, *, shard_bytes: int = SHARD_BYTES, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.path = Path(path)
        self.dtype = dtype
        self._shapes = WeightTable(spec).hf_shapes
        self._sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in self._shapes.items()}
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise CheckpointError(f"{self.path} exists and is not an empty folder; choose another target or remove it")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._check_space()
        self._partial = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        shutil.rmtree(self._partial, ignore_errors=True)  # of a killed process that had this id
        self._partial.mkdir()
        self._place: dict[str, tuple[Path, int]] = {}
        self._added: set[str] = set()
        self._lay_out(_shards(self._sizes, shard_bytes))

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one Hugging Face tensor at its offset."""
        if name not in self._shapes:
            raise CheckpointError(f"{self.path}: the model has no tensor {name!r}")
        if tuple(tensor.shape) != self._shapes[name] or tensor.dtype != self.dtype:
            expected = f"{list(self._shapes[name])} {self.dtype}"
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {list(tensor.shape)} {tensor.dtype}, expected {expected}"
            )
        file, offset = self._place[name]
        with file.open("r+b") as out:
            out.seek(offset)
            # numpy has no bfloat16: the bytes are taken as they are
            out.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self._added.add(name)

    def write_side_file(self, name: str, content: str | Mapping[str, Any]) -> None:
        """Write a text file, or a mapping as JSON, beside the weights."""
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (self._partial / name).write_text(text, encoding="utf-8")

    def copy_side_files(self, source: str | Path) -> None:
        """Copy everything but weights (config, tokenizer, chat template, ...).

        config.json then names the dtype written here.
        """
        source = Path(source)
        config = read_config(source)
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.startswith(".") and not _is_weights(file):
                shutil.copyfile(file, self._partial / file.name)
        for name in SIDE_FOLDERS:
            if (source / name).is_dir():
                shutil.copytree(source / name, self._partial / name)
        name = str(self.dtype).removeprefix("torch.")
        stale = [key for key in ("dtype", "torch_dtype") if config.get(key) not in (None, name)]
        if stale:
            self.write_side_file("config.json", {**config, **dict.fromkeys(stale, name)})

    def _check_space(self) -> None:
        need, free = sum(self._sizes.values()), shutil.disk_usage(self.path.parent).free
        if need > free:
            raise CheckpointError(
                f"{self.path}: the weights need {need / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
            )

    def _lay_out(self, shards: list[list[str]]) -> None:
        """Write each file's header, stretch it to its length, and note the offset of every tensor."""
        for number, names in enumerate(shards, 1):
            file = self._partial / (
                SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            head, offsets = _header(sorted(names), self._shapes, self.dtype)
            with file.open("wb") as out:
                out.write(head)
                out.truncate(len(head) + sum(self._sizes[name] for name in names))
            self._place.update({name: (file, len(head) + offsets[name]) for name in names})
        if len(shards) > 1:
            weight_map = {name: self._place[name][0].name for name in sorted(self._place)}
            self.write_side_file(
                INDEX, {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": weight_map}
            )

    def _finish(self) -> None:
        missing = [name for name in self._shapes if name not in self._added]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of {len(self._shapes)} tensors were never written, the first is "
                f"{missing[0]!r}"
            )
        for file in self._partial.iterdir():
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
        self._partial.replace(self.path)


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Tensor names of each file, in order.

    A new file begins when the next tensor would not fit. A tensor larger than a file has one of its own.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _header(
    names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> tuple[bytes, dict[str, int]]:
    """(length and JSON header, byte offset of each tensor in the data), byte for byte as safetensors writes them."""
    kind = next(key for key, value in DTYPES.items() if value == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for name in names:
        offsets[name], end = end, end + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _is_weights(file: Path) -> bool:
    return file.suffix in WEIGHT_SUFFIXES or file.name.endswith((".safetensors.index.json", ".bin.index.json"))
