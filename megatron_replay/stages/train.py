"""Stage 1: fine-tune with the loss restricted to the stored candidate sets, or (`train.loss=full`) with ordinary
cross-entropy at the same positions."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_replay.config import RunConfig
from megatron_replay.data.packing import Grouping, Stream, rank_micro_batches
from megatron_replay.data.samples import Sample, load_samples
from megatron_replay.device import launcher_ranks
from megatron_replay.errors import ConfigError, DataError, LayoutError, ReplayError
from megatron_replay.formats.torch_dist import is_checkpoint
from megatron_replay.optim import learning_rate
from megatron_replay.parallel.activations import Load
from megatron_replay.parallel.batch import MicroBatch, micro_batches, row_length
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.parallel.losses import full_task, imbalance, restricted_task, sets_of
from megatron_replay.parallel.mcore.lora_layers import attach
from megatron_replay.parallel.mcore.optimizer import foreign_options
from megatron_replay.parallel.memory import num_micro_batches
from megatron_replay.parallel.pipeline import TaskOf
from megatron_replay.parallel.trainer import StepResult, Trainer, make_trainer
from megatron_replay.runtime import memory_table as memory
from megatron_replay.runtime.ahead import ahead
from megatron_replay.runtime.identity import check_store
from megatron_replay.runtime.logs import Logs
from megatron_replay.runtime.output_paths import check_folder
from megatron_replay.runtime.session import Session, open_session
from megatron_replay.runtime.signals import StopRequest
from megatron_replay.runtime.trace import Trace
from megatron_replay.store import CandidateStore


def run(config: RunConfig, *, dry_run: bool = False) -> int:
    """Train and save; returns the exit code (0, or 128 + n when signal n stopped it after saving)."""
    _check(config)
    with open_session(config, seq_length=config.data.seq_length) as session:
        samples = load_samples(config.data, session.tokenizer, template=session.template)
        store = check_store(session, config.train.store, samples) if config.train.store else None
        feed = Feed(session, samples, store)
        feed.rate(0)  # a schedule that cannot be is told before anything is built
        if dry_run:
            session.say(feed.describe())
            for name, value in _balance(session, feed.micro_batches(0)).items():
                session.say(f"{name} {value:.3f} in the first step")
            session.say("\n".join(memory.lines(memory.predicted(session, feed.largest()))))
            return 0
        return _loop(session, feed)


def _check(config: RunConfig) -> None:
    train = config.train
    if train.loss == "restricted" and not train.store:
        raise ConfigError(
            "train.loss=restricted needs the candidate store of `collect`: train.store=PATH (or train.loss=full)"
        )
    check_folder(config.output, "output")
    if train.save:
        check_folder(train.save, "train.save")
        _check_adapter(config)
    ranks = (launcher_ranks() or (0, 1, 0))[1]
    replicas = max(1, ranks // (config.layout.tensor * config.layout.pipeline))
    if config.batch.total % (config.batch.micro * replicas):
        raise LayoutError(
            f"batch.total={config.batch.total} rows cannot be dealt to {replicas} data-parallel replicas in "
            "micro-batches of "
            f"{config.batch.micro}; "
            f"make it a multiple of {config.batch.micro * replicas}"
        )


def _check_adapter(config: RunConfig) -> None:
    """A folder of checkpoints is of one adapter, or of none: source.json in it says which, for all of them."""
    root = Path(config.train.save)
    if is_checkpoint(root) and (root / "hf").is_dir():
        theirs = Source(root).facts.get("adapter")
        ours = checkpoint.adapter_facts(config.adapter if config.adapter.rank else None)
        if theirs != ours:
            raise ConfigError(
                f"train.save={root}: its checkpoints have adapter {theirs}, this run has {ours}; save in another folder"
            )


@dataclass
class Feed:
    """Step -> this replica's micro-batches; a pure function of the step, so a resumed run needs only the step's
    number."""

    session: Session
    samples: list[Sample]
    store: CandidateStore | None

    def __post_init__(self) -> None:
        data, batch = self.session.config.data, self.session.config.batch
        found = len(self.samples)
        self.samples = [sample for sample in self.samples if _count(self.store, sample)]
        self.left_out = found - len(self.samples)
        if not self.samples:
            raise DataError(
                f"none of the {found} samples has a position to train on; check data.path and how the store was "
                "collected"
            )
        lengths = [len(sample) for sample in self.samples]
        grouping = Grouping([sample.ids for sample in self.samples], data.seq_length) if data.group_prefixes else None
        self.stream = Stream(
            lengths, self.session.config.seed, data.seq_length, data.packing, data.shuffle, batch.total, grouping
        )

    @cached_property
    def steps(self) -> int:
        train = self.session.config.train
        return train.iters or self.stream.num_steps(train.epochs)

    def rate(self, step: int) -> float:
        """The learning rate of a step; raises ConfigError for a schedule that does not fit the number of steps."""
        schedule, peak = self.session.config.schedule, self.session.config.optimizer.lr
        return learning_rate(
            step,
            peak=peak,
            minimum=min(schedule.min_lr, peak),
            warmup=schedule.warmup_iters,
            total=self.steps,
            style=schedule.style,
        )

    def micro_batches(self, step: int) -> list[MicroBatch]:
        world = self.session.world
        rows = self.stream.batch(step)
        mine = [
            [i for row in micro for i in row]
            for micro in rank_micro_batches(rows, world.data_rank, world.data_size, self.session.config.batch.micro)
        ]
        chosen = [[self.samples[i] for i in micro] for micro in mine]
        stored = None if self.store is None else [[self.store[sample.uid] for sample in some] for some in chosen]
        positions = [[s.positions for s in some] for some in (stored or chosen)]
        notes: list[dict[str, Any]] = [{"tokens": sum(map(len, some))} for some in chosen]
        if stored is not None and self.session.model.head is not None:
            for noted, some in zip(notes, stored, strict=True):
                noted["sets"] = sets_of(self.session.model, some)
        ids = [[s.ids for s in some] for some in chosen]
        share_prefixes = self.session.config.data.share_prefixes
        return micro_batches(
            ids, positions, notes, world.torch_device, multiple=world.tensor_size, share=share_prefixes
        )

    def largest(self) -> Load:
        """What no micro-batch of the first epoch exceeds."""
        config, world = self.session.config, self.session.world
        rows = self.stream.rows(0)
        tokens = max(sum(len(self.samples[i]) for i in row) for row in rows) * config.batch.micro
        positions = max(sum(_count(self.store, self.samples[i]) for i in row) for row in rows) * config.batch.micro
        counts = self.store.manifest.counts if self.store else {}
        candidates = math.ceil(positions * counts["ids"] / max(1, counts["positions"])) if counts else 0
        # shared ones count once
        length = row_length([min(tokens, config.data.seq_length * config.batch.micro)], world.tensor_size)
        return Load(
            tokens=length,
            positions=positions,
            candidates=candidates,
            micro_batches=num_micro_batches(config, world.size),
        )

    def describe(self) -> str:
        positions = sum(_count(self.store, sample) for sample in self.samples)
        rows = len(self.stream.rows(0))
        return (
            f"{len(self.samples)} samples in {rows} rows of up to {self.session.config.data.seq_length} tokens, "
            f"{positions} positions an "
            f"epoch; "
            f"{self.steps} steps of {self.session.config.batch.total} rows"
            + (f"; {self.left_out} more samples have no position to train on and are left out" if self.left_out else "")
        )


def _count(store: CandidateStore | None, sample: Sample) -> int:
    return len(sample.positions) if store is None else store.num_positions(sample.uid)


def _loop(session: Session, feed: Feed) -> int:
    config = session.config
    _narrow(session)
    trainer = make_trainer(session.model, config.optimizer, config.kernels)
    for option, owner in foreign_options(config.optimizer).items():
        session.say(f"optimizer.{option} is an option of {owner}, not of {config.optimizer.name}: left out")
    first = 0
    if config.train.load:
        first = int(checkpoint.load(Path(config.train.load), trainer)["iteration"])
        session.say(f"resumed from {config.train.load} at iteration {first}")
    session.say(feed.describe())
    task_of = _task(session)
    logs = Logs(session, feed.steps)
    failures = 0
    feeding = ahead(feed.micro_batches, first, feed.steps)
    with (
        StopRequest(session.world) as stop,
        logs,
        closing(feeding),
        Trace(session, trainer.timers, feed.steps - first) as trace,
    ):
        for step in range(first, feed.steps):
            trace.step()
            began = time.perf_counter()
            with trainer.timers.phase("data"):  # the wait for it
                batches = next(feeding)
            lr = feed.rate(step)
            result = trainer.step(batches, task_of, lr)
            result = dataclasses.replace(result, metrics={**result.metrics, **_balance(session, batches)})
            failures = 0 if result.applied else failures + 1
            logs.step(step + 1, result, lr, time.perf_counter() - began, batches, trainer.inner.skipped)
            _stop_if_broken(result, failures, config.train.max_skipped, step + 1)
            signal = stop.asked()
            due = config.train.save_interval and (step + 1) % config.train.save_interval == 0
            if config.train.save and (due or signal or step + 1 == feed.steps):
                with trainer.timers.phase("checkpoint"):
                    _save(session, trainer, step + 1)
            if signal:
                session.say(
                    f"stopped by signal {signal} after iteration {step + 1}" + (", saved" if config.train.save else "")
                )
                return 128 + signal
    return 0


def _narrow(session: Session) -> None:
    """Freeze what the configuration does not want trained, and say what is left."""
    config, model = session.config, session.model
    if config.adapter.rank:
        attach(model, config.adapter, config.seed)
        what = f"adapter of rank {config.adapter.rank} on {', '.join(config.adapter.targets)}"
    elif config.train.freeze_share:
        model.freeze_half(config.train.freeze_share, config.seed)
        what = f"train.freeze_share={config.train.freeze_share}"
    else:
        return
    table = model.table
    frozen = [weight for weight in table if weight.name in model.frozen]
    total, still = (sum(math.prod(shape) for weight in some for shape in weight.hf_shapes) for some in (table, frozen))
    session.say(
        f"{what}: {len(frozen)} of {len(table)} tensors ({still / 1e6:.3g} of {total / 1e6:.3g} million parameters) "
        "are frozen, "
        f"{(total - still) / 1e6:.3g} million are trained"
    )


def _task(session: Session) -> TaskOf:
    if session.config.train.loss == "restricted":
        return restricted_task(session.model, session.config.kernels)
    return full_task(session.model, session.vocab_size)


def _balance(session: Session, batches: list[MicroBatch]) -> dict[str, float]:
    """How evenly the step's candidate ids lie on the tensor ranks, where that matters. Collective."""
    if session.world.tensor_size == 1 or session.config.train.loss != "restricted":
        return {}
    return {"replay/tp_imbalance": imbalance(session.model, batches)}


def _save(session: Session, trainer: Trainer, iteration: int) -> None:
    root = Path(session.config.train.save)
    if session.world.is_main:
        facts = {
            "head_multiple": session.model.table.head_multiple,
            "dtype": str(session.model.dtype).removeprefix("torch."),
        }
        facts |= {"adapter": checkpoint.adapter_facts(session.model.table.adapter)}
        checkpoint.write_side_files(root, session.source.hf, facts)
    began = time.perf_counter()
    checkpoint.save(root, iteration, trainer, {"iteration": iteration, "seed": session.config.seed})
    session.say(f"  saved checkpoint at iteration {iteration:7d} to {root} in {time.perf_counter() - began:.1f} s")


def _stop_if_broken(result: StepResult, failures: int, limit: int, iteration: int) -> None:
    if failures >= limit:
        raise ReplayError(
            f"iteration {iteration}: the gradient was not finite for {failures} steps in a row (norm "
            f"{result.grad_norm}); "
            "lower optimizer.lr, or look at the data of these steps; the last checkpoint is intact"
        )
