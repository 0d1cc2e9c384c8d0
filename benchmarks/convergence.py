"""Train a tiny real model on a new domain with every optimizer: who is steady, who stays near, who learns.

    python benchmarks/convergence.py MODEL DOMAIN --output benchmarks/results/convergence.csv

MODEL is a Hugging Face folder of a Llama (the study's: stories260K, made by `megatron-replay convert`). DOMAIN is a
text file, or a .jsonl of which --fields are read (the study's: Spider's questions and queries). Its last tenth is never
trained on. A run takes one thread and no megatron: the optimizers of `megatron_replay.optim` alone. A run is a row,
written when it ends; runs that the file has are not repeated. `convergence_report.py` draws the figure and fills the
page's tables from the file. docs/reports/convergence.md explains the columns.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import about, processor
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from megatron_replay.optim import LOCAL, Placement, ReplayOptimizer, Shards, build_optimizer, muon_groups

BATCH, LENGTH = 4, 64
"""Windows of a step, and tokens of a window."""
PROBE_EVERY, SMOOTH, WINDOW = 2, 5, 7
"""The probe's loss is taken every so many steps; smoothed over 5 of these and detrended over 7."""
COLUMNS = (
    "date", "commit", "command", "machine", "method", "setting", "lr", "batch", "seed", "steps",
    "domain_loss", "retention_loss", "probe_sd", "train_sd", "distance", "steps_to_target", "angle_mean", "angle_p95",
    "clipped", "cpu_seconds", "weights", "probe",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison: an optimizer of ours, its options, and the factor of its learning rate."""

    name: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    lr_factor: float = 1.0


TUNED = Method(name="adamw-tuned", optimizer="adamw", options={"betas": (0.97, 0.95)}, lr_factor=0.66)
NO_MOMENTUM = Method(name="adamw-no-momentum", optimizer="adamw", options={"betas": (0.0, 0.95)}, lr_factor=0.1)
"""AdamW without momentum, which `restart` comes near to.

A step that drops the momentum is a tenth (1 - beta1) of the gradient, and here half of them do.
"""
SWEPT = (
    Method(name="adamw", optimizer="adamw"),
    TUNED,
    NO_MOMENTUM,
    Method(name="adam_atan2", optimizer="adam_atan2"),
    Method(name="moclip-45", optimizer="moclip"),
    Method(name="moclip-45-restart", optimizer="moclip", options={"obtuse": "restart"}),
    Method(name="tam-paper", optimizer="tam", options={"variant": "paper"}),
)
"""The methods compared over the learning rate."""
GRID = tuple(
    Method(
        name=f"moclip-{angle}"
        + (f"-{scope}" if scope != "global" else "")
        + (f"-{obtuse}" if obtuse != "signed" else ""),
        optimizer="moclip",
        options={"max_angle": float(angle), "scope": scope, "obtuse": obtuse},
    )
    for angle in (30, 45, 60)
    for scope in ("global", "layer", "tensor")
    for obtuse in ("signed", "restart", "project")
)
UNCAPPED = Method(name="moclip-90", optimizer="moclip", options={"max_angle": 90.0})
"""Bit for bit adam_atan2, which is checked, so one seed is enough."""
OTHERS = (
    Method(name="moclip-45-v-clipped", optimizer="moclip", options={"v_source": "clipped"}),
    Method(name="moclip-45-eps", optimizer="moclip", options={"eps": 1e-8}),
    Method(name="mofo", optimizer="mofo"),
    # its momentum lacks the factor 1 - beta1, so its steps are longer by 1 / (1 - beta1)
    Method(name="tam-adatamw", optimizer="tam", options={"variant": "adatamw"}, lr_factor=0.1),
    Method(name="muon", optimizer="muon"),
    Method(name="adamuon", optimizer="adamuon"),
)
EVERY = (*SWEPT, *(m for m in GRID if m.name not in {swept.name for swept in SWEPT}), *OTHERS)


class Layered:
    """`LOCAL`, which also knows by a parameter's name in which layer it lies, as scope="layer" needs; -1 is outside of
    all."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layer = {
            p: next((int(part) for part in name.split(".") if part.isdigit()), -1)
            for name, p in model.named_parameters()
        }

    def place(self, params: Sequence[Tensor]) -> Placement:
        return replace(LOCAL.place(params), layers=[self.layer[p] for p in params])

    def sum(self, table: Tensor) -> Tensor:
        return LOCAL.sum(table)

    def each_whole(
        self,
        params: Sequence[Tensor],
        values: Callable[[int], Tensor],
        function: Callable[[Tensor], Tensor],
        stacked: int = 1,
    ) -> Iterator[tuple[int, Tensor]]:
        return LOCAL.each_whole(params, values, function, stacked)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Token ids of every kind of text, [windows, length] each."""

    train: Tensor
    probe: Tensor
    """The fixed batch on which the loss is watched; never trained on, nor is `domain`."""
    domain: Tensor
    retention: Tensor
    """The model's own text before any training; the loss on it rises by the divergence from the model that wrote it."""


def documents(path: Path, fields: Sequence[str]) -> list[str]:
    """The records of a .jsonl, their fields on a line each; the lines of any other text."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if path.suffix != ".jsonl":
        return lines
    return ["\n".join(json.loads(line)[name] for name in fields) + "\n\n" for line in lines]


def windows(texts: Sequence[str], tokenizer: Tokenizer, *, length: int, start: int) -> Tensor:
    """The texts one after another, cut into windows [n, length], each of which begins with the token `start`."""
    ids = torch.tensor(tokenizer.encode("".join(texts), add_special_tokens=False).ids)
    rows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), start), rows], 1)


@torch.no_grad()
def own_text(model: LlamaForCausalLM, *, count: int, length: int, start: int) -> Tensor:
    """Texts that the model writes at temperature 1, [count, length]."""
    generator = torch.Generator().manual_seed(0)
    ids, cache = torch.full((count, 1), start), DynamicCache()
    while ids.shape[1] < length:
        logits = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    return ids


def make_task(
    model: LlamaForCausalLM, folder: Path, domain: Path, fields: Sequence[str], *, length: int = LENGTH
) -> Task:
    """The last tenth of the documents is held out: 8 windows spread over it are the probe, 64 others the domain's
    test."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = model.config.bos_token_id or 0
    texts = documents(domain, fields)
    cut = len(texts) * 9 // 10
    train, held_out = (windows(part, tokenizer, length=length, start=start) for part in (texts[:cut], texts[cut:]))
    spread = held_out[:: max(1, len(held_out) // 72)][:72]
    return Task(
        train=train,
        probe=spread[::9],
        domain=spread[[i for i in range(len(spread)) if i % 9]],
        retention=own_text(model, count=16, length=128, start=start),
    )


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of a token, nats."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def angle(optimizer: ReplayOptimizer) -> float:
    """Degrees between the momentum and the gradient of the whole model; nan before there is a momentum."""
    pairs = [
        (state["exp_avg"], p.grad) for p, state in optimizer.state.items() if "exp_avg" in state and p.grad is not None
    ]
    if not pairs:
        return math.nan
    m, g = (torch.cat([pair[i].flatten() for pair in pairs]).double() for i in (0, 1))
    return math.degrees(math.acos(max(-1.0, min(1.0, float(m.dot(g) / (m.norm() * g.norm()))))))


def groups_of(model: LlamaForCausalLM) -> list[dict[str, Any]]:
    """Hidden matrices and embeddings are decayed, norms are not (as megatron does)."""
    hidden, tables = muon_groups(model)
    matrices, norms = ([p for p in hidden["params"] if (p.ndim > 1) is wanted] for wanted in (True, False))
    return [{"params": matrices}, {"params": norms, "weight_decay": 0.0}, tables]


def detrended_sd(values: Sequence[float], *, width: int = WINDOW) -> float:
    """Standard deviation about a local parabola through the `width` values around each (Savitzky-Golay; the ends share
    one)."""
    y = np.asarray(values, dtype=float)
    width = min(width, len(y))
    if width < 4:
        return math.nan
    x = np.arange(width) - (width - 1) / 2
    basis = np.stack([np.ones(width), x, x**2], 1)
    hat = basis @ np.linalg.pinv(basis)
    first = np.clip(np.arange(len(y)) - width // 2, 0, len(y) - width)
    trend = np.array([hat[i - f] @ y[f : f + width] for i, f in enumerate(first)])
    return float((y - trend).std())


def smoothed(probe: Sequence[float]) -> list[float]:
    """Mean of each value and the (up to) 4 before it."""
    return [float(np.mean(probe[max(0, i + 1 - SMOOTH) : i + 1])) for i in range(len(probe))]


def target_of(rows: Sequence[dict[str, str]], lr: float) -> float:
    """The smoothed probe loss that AdamW has after three quarters of its steps at this rate, mean of the seeds."""
    curves = [
        smoothed(curve_of(row))
        for row in rows
        if (row["method"], row["setting"], float(row["lr"])) == ("adamw", "good", lr)
    ]
    return float(np.mean([curve[len(curve) * 3 // 4] for curve in curves]))


def curve_of(row: dict[str, str]) -> list[float]:
    """The probe's loss, every PROBE_EVERY steps from before the first."""
    return [float(value) for value in row["probe"].split()]


def steps_to(curve: Sequence[float], target: float) -> str:
    """The first step at which the smoothed probe loss is at the target; empty if it never is."""
    return next((str(i * PROBE_EVERY) for i, value in enumerate(smoothed(curve)) if value <= target), "")


def run(
    model: LlamaForCausalLM,
    base: dict[str, Tensor],
    task: Task,
    method: Method,
    *,
    lr: float,
    batch: int,
    seed: int,
    steps: int,
) -> dict[str, str]:
    """Train from the base weights; the rate rises over the first tenth and then stays.

    The columns that are measured.
    """
    began = time.process_time()
    model.load_state_dict(base)
    shards: Shards = Layered(model)
    rate = lr * method.lr_factor
    # the compiled kernels may differ in a last bit, and training makes that visible
    common = {"clip_grad": 1.0, "shards": shards, "kernels": "reference"}
    optimizer = build_optimizer(method.optimizer, groups_of(model), rate, **common, **method.options)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
    warmup = steps // 10
    train, angles, clipped, probe = [], [], [], []
    look = torch.no_grad()(partial(loss_of, model))
    for step in range(steps):
        if step % PROBE_EVERY == 0:
            probe.append(float(look(task.probe)))
        picks = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))
        optimizer.zero_grad()
        loss = loss_of(model, task.train[picks])
        loss.backward()
        if step >= warmup:
            angles.append(angle(optimizer))
        optimizer.step()
        train.append(loss.item())
        if step >= warmup and "moclip/clipped" in optimizer.metrics:
            clipped.append(optimizer.metrics["moclip/clipped"])
    probe.append(float(look(task.probe)))
    settled = steps // 5
    moved = sum(float((p.detach().double() - base[n].double()).square().sum()) for n, p in model.named_parameters())
    length = sum(float(base[n].double().square().sum()) for n, _ in model.named_parameters())
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return {
        "domain_loss": f"{float(look(task.domain)):.4f}",
        "retention_loss": f"{float(look(task.retention)):.4f}",
        "probe_sd": f"{detrended_sd(probe[settled // PROBE_EVERY :]):.5f}",
        "train_sd": f"{detrended_sd(train[settled:]):.5f}",
        "distance": f"{math.sqrt(moved / length):.5f}",
        "angle_mean": f"{np.nanmean(angles):.2f}",
        "angle_p95": f"{np.nanpercentile(angles, 95):.2f}",
        "clipped": f"{np.mean(clipped):.4f}" if clipped else "",
        "cpu_seconds": f"{time.process_time() - began:.1f}",
        "weights": digest[:16],
        "probe": " ".join(f"{value:.3f}" for value in probe),
    }


@dataclass(frozen=True)
class Run:
    """One training run; `setting` says which question it belongs to: good, high, sweep or batch."""

    method: Method
    setting: str
    lr: float
    batch: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The runs to do: every method at `lr` and `high_lr`.

    The methods compared most are run at the rates of `sweep` too, and with a larger batch.
    """

    lr: float
    high_lr: float
    sweep: tuple[float, ...] = ()
    large_batch: int = 4 * BATCH
    seeds: int = 3
    steps: int = 100
    methods: tuple[Method, ...] = EVERY

    def runs(self) -> list[Run]:
        """In the order in which they are done; AdamW at `lr` comes first, adam_atan2 before what must equal it."""
        settings = [
            ("good", self.lr, BATCH),
            ("high", self.high_lr, BATCH),
            *(("sweep", lr, BATCH) for lr in self.sweep),
        ]
        settings.append(("batch", self.lr, self.large_batch))
        listed = []
        for setting, lr, batch in settings:
            everyone = setting in ("good", "high")
            methods = [method for method in self.methods if everyone or method in SWEPT]
            listed += [Run(method, setting, lr, batch, seed) for method in methods for seed in range(self.seeds)]
            listed += [Run(UNCAPPED, setting, lr, batch, 0)] if everyone else []
        return listed


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("method", "setting", "lr", "batch", "seed", "steps"))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """All rows, in one move."""
    partial_file = path.with_suffix(".partial")
    with partial_file.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial_file, path)


def study(model: LlamaForCausalLM, task: Task, plan: Plan, output: Path, *, about: dict[str, str]) -> None:
    """Do the runs that the file lacks, adding each as it ends.

    Then fill in the steps to the target, which AdamW's rows define.
    """
    base = {name: value.clone() for name, value in model.state_dict().items()}
    rows = read_rows(output)
    done = {key_of(row): row["weights"] for row in rows}
    for one in plan.runs():
        named = {
            "method": one.method.name,
            "setting": one.setting,
            "lr": f"{one.lr:g}",
            "batch": str(one.batch),
            "seed": str(one.seed),
        }
        row = about | named | {"steps": str(plan.steps)}
        if key_of(row) in done:
            continue
        row |= run(model, base, task, one.method, lr=one.lr, batch=one.batch, seed=one.seed, steps=plan.steps)
        if one.method is UNCAPPED:
            same = done.get(key_of(row | {"method": "adam_atan2"}), row["weights"])
            assert same == row["weights"], "max_angle 90 is not Adam-atan2 bit for bit"
        done[key_of(row)] = row["weights"]
        rows.append(row)
        write_rows(output, rows)
        print(
            " ".join(named.values()),
            *(f"{name} {row[name]}" for name in ("domain_loss", "retention_loss", "cpu_seconds")),
            flush=True,
        )
    target = target_of(rows, plan.lr)
    print(f"the target is a probe loss of {target:.3f}")
    write_rows(output, [row | {"steps_to_target": steps_to(curve_of(row), target)} for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face folder of a Llama")
    parser.add_argument("domain", type=Path, help="a text file or a .jsonl")
    parser.add_argument("--fields", nargs="+", default=["question", "query"], help="of a .jsonl's records")
    parser.add_argument("--output", type=Path, required=True, help="csv; runs that it has are not repeated")
    parser.add_argument("--lr", type=float, default=2e-3, help="a rate that suits AdamW")
    parser.add_argument("--high-lr", type=float, default=2e-2, help="one that is too high for it")
    parser.add_argument(
        "--sweep", type=float, nargs="*", default=[5e-4, 6e-3, 6e-2], help="more rates, for the most compared methods"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    plan = Plan(lr=args.lr, high_lr=args.high_lr, sweep=tuple(args.sweep), seeds=args.seeds, steps=args.steps)
    common = about("python benchmarks/convergence.py " + shlex.join(_without_folders(sys.argv[1:])), processor())
    study(model, make_task(model, args.model, args.domain, args.fields), plan, args.output, about=common)


def _without_folders(arguments: Sequence[str]) -> list[str]:
    return [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]


if __name__ == "__main__":
    main()
