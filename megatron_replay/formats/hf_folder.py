"""Reads the weights of a Hugging Face folder, one tensor at a time, and checks them against its config.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_replay.errors import CheckpointError
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the types that weights may have."""
HASH_THREADS = 4
"""Files hashed at once; sha256 lets go of the interpreter lock."""


def sha256_file(path: str | Path, *, chunk: int = 1 << 20) -> str:
    """Hexadecimal sha256 of a file, `chunk` bytes in memory at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(chunk):
            digest.update(block)
    return digest.hexdigest()


class HFFolder:
    """The weights of a Hugging Face folder: model.safetensors, or the shards of model.safetensors.index.json.

    Opening reads the headers only. CheckpointError: no weights, a shard missing, truncated or corrupt, an index that
    does not fit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.spec = ModelSpec.from_hf(self.path)
        self.files, mapped = _weight_files(self.path)
        self._where: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in self.files:
            for name, header in _header(file).items():
                self._where[name], self._headers[name] = file, header
        for name, file in mapped.items():
            if self._where.get(name) != file:
                raise CheckpointError(
                    f"{self.path / INDEX}: tensor {name!r} is not in {file.name}, where the index says it is; "
                    "download both again"
                )

    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError when the folder lacks it."""
        return self._header_of(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of a tensor; CheckpointError for types that are not plain floats (quantised weights)."""
        kind = self._header_of(name)[1]
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is stored as {kind}; only {', '.join(DTYPES)} weights can be used"
            )
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """One tensor, mapped from its file; its memory is given back when the last reference goes."""
        self._header_of(name)
        # opened anew each time: a handle that stays open would keep every page ever read in this process
        with safe_open(self._where[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def check(self, spec: ModelSpec | None = None) -> None:
        """Check that the folder has every tensor of the model, in its shape and a float type, and no other.

        CheckpointError names the first tensor that breaks this.
        """
        spec = spec or self.spec
        expected = WeightTable(spec).hf_shapes
        problems = [f"tensor {n!r} {list(s)} is missing" for n, s in expected.items() if n not in self._headers]
        for name, (shape, _) in sorted(self._headers.items()):
            if name in expected:
                self.dtype(name)
                if shape != expected[name]:
                    problems.append(f"tensor {name!r} is {list(shape)}, expected {list(expected[name])} by config.json")
            elif not _ignorable(name, spec):
                problems.append(f"tensor {name!r} {list(shape)} does not belong to this {spec.architecture}")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckpointError(
                f"{self.path}: {problems[0]}{more}; config.json and weights must be of one model, download both again"
            )

    def fingerprint(self) -> str:
        """sha256 over the sorted (file name, sha256 of the file) of the weight files.

        Equal folders have equal fingerprints.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        files = sorted(self.files)
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashes = list(pool.map(sha256_file, files))
        lines = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, hashes, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _header_of(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self._headers[name]


def _ignorable(name: str, spec: ModelSpec) -> bool:
    """Tensors that some exporters add and that say nothing: rotary tables, and the copy of a tied embedding."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tied and name == "lm_head.weight")


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """(safetensors files, tensor name -> file as the index has it; empty without an index)."""
    if (folder / INDEX).is_file():
        mapped = {name: folder / file for name, file in _weight_map(folder / INDEX).items()}
        files = sorted(set(mapped.values()))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {missing[0]}, named by {INDEX}, is missing ({len(missing)} of {len(files)} files); "
                "download it again"
            )
        return files, mapped
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder}: only pytorch_model.bin weights, which are not read (they can run code); "
            "convert them to safetensors: load with transformers and save_pretrained"
        )
    raise CheckpointError(f"{folder}: no weights: neither {SINGLE} nor {INDEX}")


def _weight_map(path: Path) -> Mapping[str, str]:
    try:
        mapped = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        # a shard's name is a plain file name beside the index; anything else is not followed
        well_formed = bool(mapped) and all(
            isinstance(file, str) and Path(file).name == file for file in mapped.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{path}: not a safetensors index (JSON with 'weight_map'): {err}; download it again"
        ) from err
    if not well_formed:
        raise CheckpointError(f"{path}: 'weight_map' must map tensor names to file names beside it")
    return dict(mapped)


def _header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, type name) of a safetensors file; its length is checked against the header on opening."""
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in slices.items()}
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"{file}: truncated or corrupt safetensors file ({err}); download or write it again"
        ) from err
