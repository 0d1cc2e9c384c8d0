"""Time a training step on text-to-SQL questions: grouped by schema with shared prefixes, against packed without.

    python benchmarks/run.py prefix --model MODEL --data DATA --output benchmarks/results/prefix.csv

DATA is a folder with spider_train.jsonl (db_id, question, query) and spider_schemas.json; MODEL is a Hugging Face
folder. A sample is the schema, the question and the SQL, whose tokens are the targets. A step takes the questions of
the first `--rows` rows that `data.group_prefixes` makes of all questions. It takes them once as they are, and once
packed into as many rows of the same length as they need, each row a micro-batch. Then comes one AdamW update with a
learning rate of 0, so that every step does the same. Steps are interleaved in one process; `--layers` cuts the model.
The candidate sets of the restricted loss are the model's own (tau 0.95, k_max 200). `gradient` is the largest
difference of an element, relative to the largest element.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rows import about, append, machine
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_replay.candidates import CandidateRule
from megatron_replay.config import Data, Layout, Optimizer
from megatron_replay.data.packing import Grouping, pack
from megatron_replay.data.prefixes import lay
from megatron_replay.data.samples import Sample, load_samples
from megatron_replay.data.tokenizer import load_tokenizer
from megatron_replay.device import CPU
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.ops import CandidateSets
from megatron_replay.parallel.batch import MicroBatch, flatten
from megatron_replay.parallel.losses import LOSSES
from megatron_replay.parallel.mcore.model import Model, build, load_hf, vocab_shard
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.selection import Selection
from megatron_replay.parallel.trainer import Trainer, make_trainer

Row = tuple[str, str, float, str]


@dataclass(frozen=True)
class Way:
    """One way to compute the step's samples."""

    name: str
    rows: list[list[int]]
    share: bool


def questions(folder: Path, model: Path, seq_length: int) -> list[Sample]:
    """All questions with their schema before them, as `train` reads them."""
    schemas = json.loads((folder / "spider_schemas.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "spider_train.jsonl").read_text(encoding="utf-8").splitlines()]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        for line in lines:
            prompt = f"Schema:\n{schemas[line['db_id']]}\nQuestion: {line['question']}\nSQL:\n"
            file.write(json.dumps({"prompt": prompt, "completion": line["query"]}) + "\n")
        file.flush()
        return load_samples(
            Data(path=file.name, template="plain", seq_length=seq_length, over_length="drop"), load_tokenizer(model)
        )


def batches(samples: Sequence[Sample], way: Way) -> list[MicroBatch]:
    chosen = [[samples[i] for i in row] for row in way.rows]
    trees = [lay([s.ids for s in row], share_prefixes=way.share) for row in chosen]
    found = []
    for row, tree in zip(chosen, trees, strict=True):
        ids, positions = [s.ids for s in row], [s.positions for s in row]
        batch = flatten(ids, positions, max(map(len, trees)), torch.device("cpu"), tree)
        found.append(replace(batch, samples=row))
    return found


def collected(model: Model, samples: Sequence[Sample], way: Way, vocab_size: int) -> dict[bytes, CandidateSets]:
    """The model's own candidate sets of every target."""
    found: dict[bytes, CandidateSets] = {}

    selection = Selection(model, CandidateRule(), vocab_size=vocab_size, chunk_rows=256)

    def keep(batch: MicroBatch, _: Tensor) -> None:
        sets, at = selection.take(), 0
        for sample in batch.samples:
            stop = at + len(sample.positions)
            found[sample.uid] = sets.rows(at, stop)
            at = stop

    forward(model, batches(samples, way), selection, consume=keep)
    return found


def measured(
    trainer: Trainer, loss: str, vocab_size: int, steps: dict[str, list[MicroBatch]], rounds: int
) -> list[Row]:
    """Rows of one loss: every way once a round, after one round that does not count."""
    task = LOSSES.get(loss)(trainer.model, vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    grads: dict[str, Tensor] = {}
    for turn in range(rounds + 1):
        for name, some in steps.items():
            began = time.perf_counter()
            result = trainer.step(some, task, 0.0)
            if turn:
                seconds[name].append(time.perf_counter() - began)
            else:
                losses[name] = result.loss
                grads[name] = torch.cat([p.main_grad.flatten() for _, _, p in trainer.model.parameters()])
    apart, shared = steps
    rows = [(loss, f"step, {name}, minimum", min(some), "s") for name, some in seconds.items()]
    rows.append((loss, "ratio of minima", min(seconds[apart]) / min(seconds[shared]), "x"))
    paired = [a / b for a, b in zip(seconds[apart], seconds[shared], strict=True)]
    rows.append((loss, "ratio, median of rounds", statistics.median(paired), "x"))
    rows.append((loss, "loss", losses[apart], "nats"))
    rows.append((loss, "loss difference", abs(losses[shared] - losses[apart]), "nats"))
    return [
        *rows,
        (loss, "gradient difference", float((grads[shared] - grads[apart]).abs().max() / grads[apart].abs().max()), ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--layers", type=int, help="use only so many of the model's layers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--losses", nargs="+", default=["restricted", "full"])
    parser.add_argument("--output", type=Path, help="append rows to this file; without it they are printed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    samples = questions(args.data, args.model, args.seq_length)
    lengths = np.array([len(s) for s in samples])
    grouped = Grouping([s.ids for s in samples], args.seq_length).rows(42, 0)
    everything = sum(len(lay([samples[i].ids for i in row], share_prefixes=True)) for row in grouped)
    rows: list[Row] = [
        ("", "tokens of all samples", float(lengths.sum()), "tokens"),
        ("", "computed of all samples, shared", float(everything), "tokens"),
        ("", "ratio of tokens, all samples", lengths.sum() / everything, "x"),
    ]
    mine = [i for row in grouped[: args.rows] for i in row]
    apart = pack(lengths, args.seq_length, order=mine)
    ways = [Way("packed", apart, False), Way("shared", grouped[: args.rows], True)]
    for way in ways:
        tokens = sum(len(lay([samples[i].ids for i in row], share_prefixes=way.share)) for row in way.rows)
        rows.append(("", f"tokens computed in a step, {way.name}", tokens, "tokens"))
    rows.append(("", "samples in a step", len(mine), "samples"))
    with world.running(Layout(), CPU) as here:
        model = filled(args, here)
        size = load_tokenizer(args.model).size
        sets = collected(model, samples, ways[0], size)
        rows.append(("", "positions in a step", sum(s.num_positions for s in sets.values()), "positions"))
        shard = vocab_shard(model)
        steps = {
            way.name: [
                replace(batch, sets=CandidateSets.cat([sets[s.uid] for s in batch.samples]).local(shard))
                for batch in batches(samples, way)
            ]
            for way in ways
        }
        trainer = make_trainer(model, Optimizer(name="adamw", lr=0.0))
        for loss in args.losses:
            rows += measured(trainer, loss, size, steps, args.rounds)
    write(rows, args)


def filled(args: argparse.Namespace, here: world.World) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        source = HFFolder(first_layers(args.model, args.layers, Path(folder)) if args.layers else args.model)
        model = build(source.spec, Layout(), here, torch.float32, seq_length=args.seq_length)
        load_hf(model, source)
        return model


def first_layers(whole: Path, layers: int, folder: Path) -> Path:
    """A copy of a model that ends after so many layers."""
    config = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}), encoding="utf-8")
    tensors = {name: tensor for file in whole.glob("*.safetensors") for name, tensor in load_file(file).items()}
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write(rows: list[Row], args: argparse.Namespace) -> None:
    command = f"python benchmarks/run.py prefix --model {args.model.name} --data {args.data.name}"
    command += f" --seq-length {args.seq_length} --rows {args.rows}"
    command += f" --layers {args.layers}" * bool(args.layers) + f" --rounds {args.rounds} --threads {args.threads}"
    common = about(command, machine())
    append(
        [
            {**common, "loss": loss, "threads": args.threads, "metric": metric, "value": f"{value:.6g}", "unit": unit}
            for loss, metric, value, unit in rows
        ],
        args.output,
    )


if __name__ == "__main__":
    main()
