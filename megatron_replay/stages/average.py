"""The way back: base + alpha (mean of trained models - base), written as a model or measured at several alphas.

Averaging a model with the one it was trained from gives up little of what was learnt for much of what was forgotten
(WiSE-FT, arXiv 2109.01903; model averaging against the alignment tax, arXiv 2309.06256).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_replay.config import RunConfig
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.formats.hf_writer import HFWriter
from megatron_replay.formats.torch_dist import Reader
from megatron_replay.models.weights import Weight, split
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.runtime.output_paths import check_folder, replace_file
from megatron_replay.runtime.progress import progress
from megatron_replay.runtime.session import open_session
from megatron_replay.runtime.way_back import WayBack
from megatron_replay.scoring.table import flat, show_rows, shown
from megatron_replay.stages.evaluate import check, evaluate, plain

Read = Callable[[Weight], Mapping[str, Tensor]]
"""A parameter -> its tensors by their Hugging Face names."""


def run(config: RunConfig, base: str, models: Sequence[str]) -> None:
    """Write `average.output`, or measure at each alpha of `average.sweep`, or both.

    Raises ConfigError where neither is set, CheckpointError for models of another shape than the base.
    """
    asked = config.average
    if not (asked.output or asked.sweep):
        raise ConfigError("set average.output=PATH to write a model, average.sweep=[0.7, 0.85, 1] to measure, or both")
    sources = [Source.open(path) for path in (base, *models)]
    for path, source in zip(models, sources[1:], strict=True):
        if source.spec != sources[0].spec:
            raise CheckpointError(f"{path}: is of another shape than {base}; average models trained from the same base")
    if asked.sweep:
        check(config)
    if asked.output:
        check_folder(asked.output, "average.output")
    if asked.sweep:
        sweep(config, sources)
    if asked.output:
        write(Path(asked.output), sources, asked.alpha)


def sweep(config: RunConfig, sources: Sequence[Source]) -> None:
    """Measure at each alpha, in one session whose parameters are set from the two ends."""
    config = replace(config, model=str(sources[0].path))
    quiet = replace(config, evaluate=replace(config.evaluate, output=""))
    with open_session(quiet, seq_length=config.data.seq_length) as session:
        way = WayBack(session.model)
        for source in sources[1:]:
            source.fill(session.model)
            way.add()
        results = []
        for alpha in config.average.sweep:
            way.move(alpha)
            session.say(f"alpha {alpha:g}")
            results.append({"alpha": alpha, **evaluate(session)})
        if session.world.is_main:
            _show(results)
            if config.evaluate.output:
                text = json.dumps([plain(result) for result in results], indent=1) + "\n"
                replace_file(Path(config.evaluate.output), text)


def _show(results: Sequence[Mapping[str, Any]]) -> None:
    """The numbers of all alphas side by side."""
    columns = [flat(result) for result in results]
    names = [name for name, value in columns[0].items() if name != "alpha" and not isinstance(value, (str, list))]
    heads = ("measure", *(f"alpha {result['alpha']:g}" for result in results))
    show_rows("the way back", heads, [(name, *(shown(column[name]) for column in columns)) for name in names])


def write(path: Path, sources: Sequence[Source], alpha: float) -> None:
    """Write base + alpha (mean - base) as a Hugging Face folder of the base's type, one parameter at a time."""
    table = sources[0].table
    readers = [_reader(source) for source in sources]
    dtype = next(iter(readers[0](table.base[0]).values())).dtype
    with HFWriter(path, table.spec, dtype=dtype) as out, progress("average", table.numel, "parameters") as advance:
        for weight in table.base:
            parts = [read(weight) for read in readers]
            for name, start in parts[0].items():
                trained = torch.stack([part[name].to(torch.float64) for part in parts[1:]]).mean(0)
                out.add(name, (start + alpha * (trained - start)).to(dtype))
                advance(start.numel())
        out.copy_side_files(sources[0].hf)
    print(f"{path}: alpha {alpha:g} of the way from {sources[0].path} to {len(sources) - 1} trained models", flush=True)


def _reader(source: Source) -> Read:
    if not source.is_checkpoint:
        folder = HFFolder(source.path)
        return lambda weight: {name: folder.read(name) for name in weight.hf}
    reader = Reader(source.path)
    reader.check(source.table)
    return lambda weight: split(_of(source, weight), reader.read_merged(_of(source, weight), source.table))


def _of(source: Source, weight: Weight) -> Weight:
    """The parameter as it lies in this source, whose head padding may be another than the base's."""
    return next(own for own in source.table.base if own.name == weight.name)
