"""Training checkpoints in megatron's torch_dist format: written on one layout, read on any.

ROOT/latest_checkpointed_iteration.txt, ROOT/iter_0000100/ (tensors), ROOT/hf/ (config.json, tokenizer and source.json:
the checkpoint is complete without the folder it came from). A save is finished when its iteration stands in the text
file, which is replaced atomically, last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_replay.config import Adapter
from megatron_replay.errors import CheckpointError
from megatron_replay.formats.torch_dist import LATEST, Reader, refuse_code, resolve
from megatron_replay.models.weights import shard
from megatron_replay.parallel.mcore import zero1
from megatron_replay.parallel.mcore.model import Model
from megatron_replay.parallel.mcore.optimizer import adam_form, restripe_state
from megatron_replay.parallel.trainer import Trainer

SIDE_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
"""Endings of the files that describe a model besides its weights; the weights' own index is left out."""


def save(root: Path, iteration: int, trainer: Trainer, progress: dict[str, Any]) -> Path:
    """Write model, optimizer, RNG and `progress` (the other plain values a resumed run needs).

    Returns the iteration's folder.
    """
    from megatron.core import dist_checkpointing

    world = trainer.model.world
    target = root / f"iter_{iteration:07d}"
    if world.is_main:
        shutil.rmtree(target, ignore_errors=True)  # of a killed save
        target.mkdir(parents=True)
    world.barrier()
    try:
        with adam_form(trainer.inner, zero1=_zero1(trainer)):
            dist_checkpointing.save(
                _state(trainer, {**progress, "travel": trainer.inner.update_rms_sums()}, loading=False), str(target)
            )
    # CheckpointException is what megatron gathers from all ranks, and no Exception
    except (Exception, CheckpointException) as err:
        said = [line.strip() for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
        free = shutil.disk_usage(root).free / 1e9
        raise CheckpointError(
            f"{target}: cannot be written ({said[-1]}); {free:.1f} GB are free there; make room and resume, earlier "
            "checkpoints are intact"
        ) from err
    world.barrier()
    if world.is_main:
        _replace(root / LATEST, str(iteration))
    world.barrier()  # a rank that loads at once finds what was saved
    return target


def load(root: Path, trainer: Trainer) -> dict[str, Any]:
    """Fill model and optimizer from the latest checkpoint, whatever layout wrote it; returns its `progress`."""
    from megatron.core import dist_checkpointing

    folder = resolve(root)
    refuse_code(folder)
    reader = Reader(folder)
    reader.check(trainer.model.table.base)
    common = dist_checkpointing.load_common_state_dict(str(folder))
    if "optimizer" not in common:
        raise CheckpointError(
            f"{folder}: holds a model without optimizer state (made by convert); give it as model=, not as train.load="
        )
    if "progress" not in common:
        raise CheckpointError(
            f"{folder}: was not written by `train`, so where its run stood is not known; give it as model=, not as "
            "train.load="
        )
    saved = common["progress"]
    _fits(saved, trainer, folder)
    _same("layout.zero1", saved["zero1"], _zero1(trainer), folder)
    for key, ours in _trained_part(trainer.model).items():
        _same(key, saved.get(key), ours, folder)
    with adam_form(trainer.inner, zero1=_zero1(trainer)):
        with _named(folder):
            state = dist_checkpointing.load(_state(trainer, saved, loading=True), str(folder))
        trainer.model.module.load_state_dict(state["model"])
        with torch.no_grad():
            zero1.load_state(trainer.outer, state["optimizer"])
    if reader.striped != trainer.model.table.striped:
        restripe_state(trainer.model, trainer.outer, trainer.inner, striped=reader.striped)
        _restripe(trainer.model, reader)  # last: in fp32 the weights that were just moved are these
    trainer.inner.restore_update_rms(*saved["travel"])
    # every rank continues from the state of the rank that wrote it: order and selection are seeded functions, nothing
    # random depends on the rank
    torch.set_rng_state(saved["rng"].cpu())
    return dict(saved)


def load_model(root: Path, model: Model, adapter: Adapter | None = None) -> None:
    """Fill just the model from a checkpoint.

    The factors of its `adapter`, which must be there, are left for `lora_layers.merge_into`.
    """
    from megatron.core import dist_checkpointing

    folder = resolve(root)
    refuse_code(folder)
    reader = Reader(folder)
    reader.check(model.table.with_adapter(adapter))
    with _named(folder):
        state = dist_checkpointing.load({"model": model.module.sharded_state_dict()}, str(folder))
    model.module.load_state_dict(state["model"])
    if reader.striped != model.table.striped:
        _restripe(model, reader)


@torch.no_grad()
def _restripe(model: Model, reader: Reader) -> None:
    """Read the embedding and head again, in the order of this run's rows: megatron loads rows by number."""
    for _, weight, parameter in model.parameters():
        if weight.kind == "vocab":
            parameter.copy_(shard(reader.read(weight), weight.axis, model.world.tensor_rank, model.world.tensor_size))


def write_side_files(root: Path, hf: Path, facts: dict[str, Any], stop_ids: Sequence[int] = ()) -> None:
    """Make ROOT/hf: the configuration and tokenizer files of the model's folder, and `facts` (source.json).

    Without the facts the checkpoint cannot be exported. generation_config.json names `stop_ids` as eos, if there are
    some that it does not name.
    """
    side = root / "hf"
    if side.resolve() == hf.resolve():
        return
    side.mkdir(parents=True, exist_ok=True)
    for file in hf.iterdir():
        if file.is_file() and file.suffix in SIDE_FILES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, side / file.name)
    _replace(side / "source.json", json.dumps(facts))
    _name_stop_ids(side / "generation_config.json", stop_ids)


def _name_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    named = known.get("eos_token_id")
    if set(stop_ids) - set(named if isinstance(named, list) else [named]):
        _replace(path, json.dumps({**known, "eos_token_id": list(stop_ids)}, indent=2) + "\n")


def _state(trainer: Trainer, progress: dict[str, Any], *, loading: bool) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "distrib_optim_sharding_type": zero1.FORM,
        "dp_cp_group": trainer.model.world.data_group,
    }
    model = {"model": trainer.model.module.sharded_state_dict(metadata=metadata)}
    named = model
    # some layers train a matrix and some do not: its state cannot be one tensor over all layers
    if trainer.model.frozen_by is not None:
        named = {
            "model": trainer.model.module.sharded_state_dict(metadata={**metadata, "non_homogeneous_layers": True})
        }
    optimizer = zero1.sharded_state(trainer.outer, named, metadata, loading=loading)
    return {**model, "optimizer": optimizer, "progress": {**progress, **_facts(trainer), "rng": torch.get_rng_state()}}


def adapter_facts(adapter: Adapter | None) -> dict[str, Any] | None:
    """The adapter as JSON and checkpoints hold it; None for none."""
    return None if adapter is None else {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets)}


def _trained_part(model: Model) -> dict[str, Any]:
    """The settings that decide which tensors are trained; None for all of the model's own."""
    frozen = None if model.frozen_by is None else list(model.frozen_by)
    return {"adapter": adapter_facts(model.table.adapter), "(train.freeze_share, seed)": frozen}


def _facts(trainer: Trainer) -> dict[str, Any]:
    world = trainer.model.world
    return {
        **_trained_part(trainer.model),
        "optimizer": type(trainer.inner).__name__,
        "state": _form(trainer),
        "zero1": _zero1(trainer),
        "striped": trainer.model.table.striped,
        "layout": [world.tensor_size, world.pipeline_size, world.data_size],
        "skipped": trainer.inner.skipped,
    }


def _zero1(trainer: Trainer) -> bool:
    return bool(trainer.wrapped.ddp_config.use_distributed_optimizer)


def _form(trainer: Trainer) -> list[list[str]]:
    """State tensors of a hidden matrix, and of everything else.

    An optimizer goes on from another's checkpoint where these agree.
    """
    return [list(trainer.inner.keys_of(kind)) for kind in ("matrix", "vector")]


def _fits(saved: dict[str, Any], trainer: Trainer, folder: Path) -> None:
    if saved["state"] != _form(trainer):
        raise CheckpointError(
            f"{folder}: was written by {saved['optimizer']}, whose state {type(trainer.inner).__name__} cannot go on "
            "from; "
            "resume with the same optimizer, or start anew from its weights with model="
        )


def _same(setting: str, saved: Any, ours: Any, folder: Path) -> None:
    if saved != ours:
        raise CheckpointError(
            f"{folder}: was written with {setting}={saved}, this run has {setting}={ours}; resume with the same setting"
        )


class _named:
    """A context that turns megatron's report of a damaged checkpoint into one line that names it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if (
            error is not None
            and isinstance(error, (Exception, CheckpointException))
            and not isinstance(error, CheckpointError)
        ):
            # what megatron gathers from all ranks is a traceback, whose last line is the cause
            said = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise CheckpointError(
                f"{self.folder}: cannot be loaded into this model ({said}); use another checkpoint"
            ) from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
