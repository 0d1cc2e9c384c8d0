"""Convert a model between Hugging Face folders and megatron checkpoints, on the cpu, one tensor in memory at a time.

The source decides the kind of the result. A Hugging Face folder becomes a checkpoint that any layout loads. A
checkpoint (also one of training, on any layout) becomes a Hugging Face folder; so does a .gguf or llama2.c .bin file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_replay.config import RunConfig
from megatron_replay.device import CPU
from megatron_replay.device import dtype as device_dtype
from megatron_replay.errors import CheckpointError
from megatron_replay.formats import torch_dist
from megatron_replay.formats.gguf import import_gguf
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.formats.hf_writer import HFWriter
from megatron_replay.formats.llama2c import import_llama2c
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import Weight, merge, split
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.runtime.conversion_check import Pair, compare_logits, compare_tensors
from megatron_replay.runtime.output_paths import check_folder
from megatron_replay.runtime.progress import progress

TOKENIZERS = ("tok512.bin", "tokenizer.bin")
"""Names of the tokenizer beside a llama2.c .bin file."""
SOURCE_NOTE = "source.json"


def run(config: RunConfig, source: str, target: str, *, verify: bool = False) -> None:
    """Convert `source` to `target`; with `verify` read it back and compare the tensors, and the logits of a few rows.

    The weights keep their dtype unless `precision` names another; `layout.head_multiple` pads the heads of a checkpoint
    that is made. Raises CheckpointError for a source that is no model or damaged, a target that is not empty, or a
    result that is not the source.
    """
    given, made = Path(source), Path(target)
    if made.exists() and (not made.is_dir() or any(made.iterdir())):
        raise CheckpointError(f"{made} exists and is not an empty folder; choose another target or remove it")
    check_folder(made, "TARGET")
    try:
        if given.is_file():
            _import_file(given, made)
            return
        pair = _export(config, given, made) if torch_dist.is_checkpoint(given) else _import(config, given, made)
        if verify:
            with progress("verify", pair.size, "bytes") as advance:
                count = compare_tensors(pair, advance)
            difference, positions = compare_logits(pair)
            print(
                f"verified: {count} tensors equal by sha256, logits of {positions} positions differ by at most "
                f"{difference:.3g}",
                flush=True,
            )
    except OSError as err:
        raise CheckpointError(f"{err.filename or made}: {err.strerror or err}") from err


def _import(config: RunConfig, given: Path, made: Path) -> Pair:
    """Hugging Face folder -> checkpoint ROOT, written beside the target and renamed when it is complete."""
    folder = HFFolder(given)
    folder.check()
    table = WeightTable(folder.spec, head_multiple=config.layout.head_multiple)
    dtype = _dtype(config, given, {name: folder.dtype(name) for name in table.hf_shapes})
    size = table.numel * dtype.itemsize

    def tensors(weight: Weight) -> Tensor:
        whole = merge(weight, {name: folder.read(name).to(dtype) for name in weight.hf})
        advance(whole.nbytes)
        return whole

    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_name(f".{made.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this id
    try:
        with progress("convert", size, "bytes") as advance:
            torch_dist.write_model(partial / torch_dist.iteration_name(0), table, tensors, dtype=dtype)
        facts = {"fingerprint": folder.fingerprint(), "head_multiple": table.head_multiple, "dtype": _name(dtype)}
        checkpoint.write_side_files(partial, given, facts)
        (partial / torch_dist.LATEST).write_text("0", encoding="utf-8")
        partial.replace(made)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    padding = f"layout.head_multiple={table.head_multiple}"
    _report(given, made, size, f"a checkpoint for any layout, {_name(dtype)}, {padding}")
    return Pair(table, folder, torch_dist.Reader(made), dtype)


def _export(config: RunConfig, given: Path, made: Path) -> Pair:
    """Checkpoint -> Hugging Face folder.

    Its configuration and tokenizer files are those in the checkpoint's hf folder.
    """
    source = Source.open(str(given))
    reader, table = torch_dist.Reader(given), source.table
    reader.check(table)
    dtype = _dtype(config, given, {weight.name: reader.dtype(weight) for weight in table.base})
    size = table.numel * dtype.itemsize
    with HFWriter(made, table.spec, dtype=dtype) as out, progress("convert", size, "bytes") as advance:
        for weight in table.base:
            whole = reader.read_merged(weight, table)
            for name, tensor in split(weight, whole).items():
                out.add(name, tensor.to(dtype))
            advance(whole.nbytes)
        out.copy_side_files(source.hf)
    (made / SOURCE_NOTE).unlink(missing_ok=True)  # what the checkpoint was made of, not what this folder is
    merged = f", an adapter of rank {table.adapter.rank} merged" if table.adapter else ""
    _report(reader.folder, made, size, f"a Hugging Face folder, {_name(dtype)}{merged}")
    return Pair(table, HFFolder(made), reader, dtype)


def _import_file(given: Path, made: Path) -> None:
    """A .gguf or llama2.c .bin file -> Hugging Face folder."""
    if given.suffix == ".gguf":
        import_gguf(given, made)
    elif given.suffix == ".bin":
        beside = [given.with_name(name) for name in TOKENIZERS]
        tokenizer = next((path for path in beside if path.is_file()), None)
        if tokenizer is None:
            raise CheckpointError(
                f"{given}: no tokenizer beside it; put the model's own there as {' or '.join(TOKENIZERS)}"
            )
        import_llama2c(given, tokenizer, made)
    else:
        raise CheckpointError(
            f"{given}: give a .gguf or llama2.c .bin file, a Hugging Face folder, or a checkpoint folder"
        )
    folder = HFFolder(made)
    folder.check()
    dtype = folder.dtype(folder.names()[0])
    _report(given, made, WeightTable(folder.spec).numel * dtype.itemsize, f"a Hugging Face folder, {_name(dtype)}")


def _dtype(config: RunConfig, where: Path, stored: Mapping[str, torch.dtype]) -> torch.dtype:
    """The type to write: that of `precision`, else the stored one; CheckpointError where that is more than one."""
    if config.precision != "auto":
        return device_dtype(config.precision, CPU)
    examples = {kind: name for name, kind in stored.items()}
    if len(examples) > 1:
        found = " and ".join(f"{_name(kind)} ({name})" for kind, name in sorted(examples.items(), key=str))
        raise CheckpointError(
            f"{where}: the weights are stored as {found}; choose one with precision=fp32 or precision=bf16"
        )
    return next(iter(examples))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _report(given: Path, made: Path, size: int, result: str) -> None:
    print(f"{given} -> {made}: {result}, {size / 1e9:.3g} GB; peak memory {CPU.peak_memory() / 1e9:.2f} GB", flush=True)
