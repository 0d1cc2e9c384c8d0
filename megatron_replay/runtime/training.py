"""A training run in an open session: its data and loss made ready, the loop of steps, and its checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import closing
from pathlib import Path

from megatron_replay.config import RunConfig
from megatron_replay.data.samples import load_samples
from megatron_replay.device import launcher_ranks
from megatron_replay.errors import ConfigError, LayoutError, ReplayError
from megatron_replay.formats.torch_dist import is_checkpoint
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.parallel.losses import LOSSES, Loss
from megatron_replay.parallel.mcore.lora_layers import attach
from megatron_replay.parallel.mcore.optimizer import foreign_options
from megatron_replay.parallel.trainer import StepResult, Trainer, make_trainer
from megatron_replay.runtime.ahead import ahead
from megatron_replay.runtime.feed import Feed
from megatron_replay.runtime.identity import check_store
from megatron_replay.runtime.logs import Logs
from megatron_replay.runtime.output_paths import check_folder
from megatron_replay.runtime.rehearsal import open_rehearsal
from megatron_replay.runtime.session import Session
from megatron_replay.runtime.signals import StopRequest
from megatron_replay.runtime.trace import Trace


def check_run(config: RunConfig) -> None:
    """Check what needs no ranks: paths, stores that must be named, and the batch on this world."""
    kind, train = LOSSES.get(config.train.loss), config.train
    if kind.needs_sets and not train.store:
        others = " or ".join(f"train.loss={name}" for name in LOSSES if not LOSSES.get(name).needs_sets)
        raise ConfigError(
            f"train.loss={train.loss} needs the candidate store of `collect`: train.store=PATH (or {others})"
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
            f"micro-batches of {config.batch.micro}; make it a multiple of {config.batch.micro * replicas}"
        )


def prepare(session: Session) -> Feed:
    """The data, sets, loss and texts of a run. Raises ReplayError for input that cannot be used."""
    config = session.config
    kind = LOSSES.get(config.train.loss)
    samples = load_samples(config.data, session.tokenizer, template=session.template)
    store = check_store(session, config.train.store, samples) if config.train.store else None
    if store is not None:
        _check_logits(config, kind, store.manifest.logits)
    loss = kind(session.model, session.vocab_size, config.kernels)
    feed = Feed(session, samples, store, loss, open_rehearsal(session, samples))
    feed.rate(0)  # a schedule that cannot be is refused before anything is built
    return feed


def _check_logits(config: RunConfig, kind: type[Loss], logits: str) -> None:
    if kind.needs_logits and logits == "none":
        raise ConfigError(
            f"train.loss={config.train.loss} needs the base model's logits, and {config.train.store} was collected "
            "without them; collect again with collect.logits=fp16 (or bf16)"
        )


def _check_adapter(config: RunConfig) -> None:
    """Check that all checkpoints of the folder are of this run's adapter, or of none; its source.json holds for all."""
    root = Path(config.train.save)
    if is_checkpoint(root) and (root / "hf").is_dir():
        theirs = Source(root).facts.get("adapter")
        ours = checkpoint.adapter_facts(config.adapter if config.adapter.rank else None)
        if theirs != ours:
            raise ConfigError(
                f"train.save={root}: its checkpoints have adapter {theirs}, this run has {ours}; save in another folder"
            )


def train(session: Session, feed: Feed) -> int:
    """Train and save; returns the exit code (0, or 128 + n when signal n stopped it after saving)."""
    config = session.config
    _freeze(session)
    trainer = make_trainer(session.model, config.optimizer, config.kernels)
    for option, owner in foreign_options(config.optimizer).items():
        session.say(f"optimizer.{option} is an option of {owner}, not of {config.optimizer.name}: left out")
    first = 0
    if config.train.load:
        first = int(checkpoint.load(Path(config.train.load), trainer)["iteration"])
        session.say(f"resumed from {config.train.load} at iteration {first}")
    session.say(feed.describe())
    loss = feed.loss
    logs = Logs(session, feed.steps, loss.log_name)
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
            result = trainer.step(batches, feed.task, lr)
            result = dataclasses.replace(result, metrics={**result.metrics, **loss.metrics(batches)})
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


def _freeze(session: Session) -> None:
    """Freeze the tensors that the configuration does not want trained, and say how many are left."""
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
        f"are frozen, {(total - still) / 1e6:.3g} million are trained"
    )


def _save(session: Session, trainer: Trainer, iteration: int) -> None:
    root = Path(session.config.train.save)
    if session.world.is_main:
        facts = {
            "head_multiple": session.model.table.head_multiple,
            "dtype": str(session.model.dtype).removeprefix("torch."),
        }
        facts |= {"adapter": checkpoint.adapter_facts(session.model.table.adapter)}
        checkpoint.write_side_files(root, session.source.hf, facts, session.stop_ids)
    began = time.perf_counter()
    checkpoint.save(root, iteration, trainer, {"iteration": iteration, "seed": session.config.seed})
    session.say(f"  saved checkpoint at iteration {iteration:7d} to {root} in {time.perf_counter() - began:.1f} s")


def _stop_if_broken(result: StepResult, failures: int, limit: int, iteration: int) -> None:
    if failures >= limit:
        raise ReplayError(
            f"iteration {iteration}: the gradient was not finite for {failures} steps in a row "
            f"(norm {result.grad_norm}); lower optimizer.lr, or look at the data of these steps; "
            "the last checkpoint is intact"
        )
