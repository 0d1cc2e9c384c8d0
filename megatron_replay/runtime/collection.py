"""A collection of Stage 0: the base model runs once over samples, and the sets of the chosen positions are stored.

Each data-parallel replica takes every `data_size`-th sample and writes its
own segment files; with `data.share_prefixes` it takes those that begin alike. A run that was stopped goes on where it
was, and with the same rows. A row that was half done is computed again as a whole.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_replay import __version__
from megatron_replay.candidates import CandidateRule
from megatron_replay.data.packing import order
from megatron_replay.data.samples import Sample, fingerprint
from megatron_replay.errors import ConfigError
from megatron_replay.ops import BucketRule, CandidateSets, bucket_counts, bucket_edges, position_uniform
from megatron_replay.ops.positions import bucket_of
from megatron_replay.parallel.batch import MicroBatch, Task, micro_batches
from megatron_replay.parallel.inference import deal, in_groups
from megatron_replay.parallel.pipeline import forward
from megatron_replay.parallel.selection import Chooser, Confidence, Selection
from megatron_replay.runtime.identity import model_fingerprint
from megatron_replay.runtime.session import Session
from megatron_replay.store import (
    CandidateStore,
    Manifest,
    SampleSets,
    Writer,
    begin,
    finish,
    has_plan,
    is_complete,
    load_plan,
)


@dataclass
class Collection:
    session: Session
    samples: list[Sample]
    rule: CandidateRule = field(init=False)
    shared: int = 0
    """Tokens of this replica's samples that were computed together with another sample's."""

    def __post_init__(self) -> None:
        self.rule = self.session.config.collect.rule(self._always())

    def collect(self) -> None:
        session, world = self.session, self.session.world
        path = session.config.collect.store
        plan = self._plan(path)
        if is_complete(path):
            session.say(f"{path}: complete already, with these settings and this data; nothing to do")
            return
        world.barrier()
        writer = Writer(path, rank=world.data_rank) if world.speaks else None
        done = {uid for uids in world.gather_objects(writer.done if writer else set()) for uid in uids}
        for line in [line for lines in world.gather_objects(writer.recovered if writer else []) for line in lines]:
            session.say(line)
        self.shared = 0  # not those of the bucket edges
        try:
            seconds = self._pass(done, plan, writer)
        except BaseException:
            if writer is not None:
                writer.suspend()
            raise
        if writer is not None:
            writer.close()
        world.barrier()
        (shared,) = world.total(self.shared)
        if world.is_main:
            finish(path, plan)
            session.say(_summary(path, seconds, sum(len(s) for s in self.samples), int(shared)))
        world.barrier()

    def predict(self) -> None:
        """Measure a few samples and extrapolate: positions, bytes, time."""
        session = self.session
        picked = [
            self.samples[i] for i in order(len(self.samples), session.config.seed, 0)[: 8 * session.world.data_size]
        ]
        edges, counts = self._edges(picked)
        found: list[CandidateSets] = []
        began = time.perf_counter()
        choose = (
            _bucket_chooser(BucketRule(edges, session.config.collect.fraction, session.config.seed, counts))
            if edges
            else None
        )

        selection = self._selection(choose)
        self._run(self._rows(picked), self._wanted, selection, lambda *_: found.append(selection.take()))
        seconds = time.perf_counter() - began
        ids, positions = session.world.total(sum(len(s.ids) for s in found), sum(s.num_positions for s in found))
        ratio = sum(map(len, self.samples)) / sum(map(len, picked))
        per_id = 1.5  # 11.4 to 12.1 bits an id, measured
        session.say(
            f"{len(self.samples)} samples, about {positions * ratio:,.0f} positions, "
            f"{(ids * per_id + positions * 12) * ratio / 1e6:,.3g} MB, {seconds * ratio:,.0f} s (from {len(picked)} "
            "samples)"
        )

    def _selection(self, choose: Chooser | None) -> Selection:
        config = self.session.config
        return Selection(
            self.session.model,
            self.rule,
            vocab_size=self.session.vocab_size,
            chunk_rows=config.collect.chunk_rows,
            choose=choose,
            kernels=config.kernels,
        )

    def _always(self) -> tuple[int, ...]:
        if not self.session.config.collect.stop_token:
            return ()
        ids = tuple(sorted(self.session.stop_ids))
        if not ids:
            raise ConfigError(
                "collect.stop_token=true, but the tokenizer names no eos; set eos_token_id in generation_config.json"
            )
        return ids

    def _plan(self, path: str) -> Manifest:
        """The settings of this store.

        Its bucket edges come from an earlier start of the same collection, or from a first pass.
        """
        manifest = self._manifest()
        if has_plan(path):
            known = load_plan(path)
            edges, counts = known.bucket_edges, known.bucket_counts
        else:
            edges, counts = self._edges(self._edge_samples())
        manifest = dataclasses.replace(manifest, bucket_edges=edges, bucket_counts=counts)
        if self.session.world.is_main:
            begin(path, manifest)
        self.session.world.barrier()
        return manifest

    def _manifest(self) -> Manifest:
        session, config = self.session, self.session.config
        collect, world = config.collect, session.world
        return Manifest(
            model=model_fingerprint(session),
            tokenizer=session.tokenizer.fingerprint,
            template=session.template.fingerprint,
            dataset=fingerprint(self.samples),
            vocab_size=session.vocab_size,
            vocab_padded=session.model.spec.padded_vocab(),
            **dataclasses.asdict(self.rule),
            strategy=collect.strategy,
            fraction=collect.fraction,
            buckets=collect.buckets,
            seed=config.seed,
            dtype=str(session.model.dtype).removeprefix("torch."),
            codec=collect.codec,
            logits=collect.logits,
            layout={
                "tensor": world.tensor_size,
                "pipeline": world.pipeline_size,
                "data": world.data_size,
                "micro": config.batch.micro,
            },
            versions={"megatron_replay": __version__, "torch": torch.__version__},
        )

    def _edge_samples(self) -> list[Sample]:
        picked = order(len(self.samples), self.session.config.seed, 0)[: self.session.config.collect.bucket_samples]
        return [self.samples[i] for i in sorted(picked)]

    def _edges(self, picked: Sequence[Sample]) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """(edges, counts) of the confidence buckets over these samples; empty for the strategies that need none."""
        collect, world = self.session.config.collect, self.session.world
        if collect.strategy != "bucket":
            return (), ()
        values: list[np.ndarray] = [np.zeros(0, np.float64)]
        with self.session.progress("bucket edges", sum(map(len, picked)), "tokens") as advance:

            def keep(batch: MicroBatch, out: Tensor) -> None:
                values.append(out.cpu().double().numpy())
                advance(sum(map(len, batch.samples)) * world.data_size)

            confidence = Confidence(
                self.session.model, vocab_size=self.session.vocab_size, chunk_rows=collect.chunk_rows
            )
            self._run(self._rows(picked), lambda s: s.positions, confidence, keep)
        joined = np.concatenate(world.gather_objects(np.concatenate(values) if world.speaks else np.zeros(0)))
        edges = bucket_edges(joined, collect.buckets)
        return edges, bucket_counts(joined, edges)

    def _wanted(self, sample: Sample) -> np.ndarray:
        """The positions of a sample that go through the head: for `bucket` all targets, for the others those chosen."""
        collect = self.session.config.collect
        if collect.strategy == "last":
            return sample.positions[-1:]
        if collect.strategy == "random":
            return sample.positions[
                position_uniform(self.session.config.seed, sample.uid, sample.positions) < collect.fraction
            ]
        return sample.positions

    def _rows(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """This replica's rows of some samples."""
        config = self.session.config
        row_tokens = config.data.seq_length * config.batch.micro
        dealt = deal(
            [s.ids for s in samples], row_tokens, self.session.world, share_prefixes=config.data.share_prefixes
        )
        return [[samples[i] for i in row] for row in dealt]

    def _pass(self, done: set[bytes], plan: Manifest, writer: Writer | None) -> float:
        todo = [row for row in self._rows(self.samples) if any(sample.uid not in done for sample in row)]
        began = time.perf_counter()
        choose = None
        if plan.strategy == "bucket":
            choose = _bucket_chooser(BucketRule(plan.bucket_edges, plan.fraction, plan.seed, plan.bucket_counts))
        selection = self._selection(choose)
        with self.session.progress(
            "collect", sum(len(s) for row in todo for s in row) * self.session.world.data_size, "tokens"
        ) as advance:

            def keep(batch: MicroBatch, chosen: Tensor) -> None:
                sets = selection.take()  # on every rank that has some, or they would pile up
                if writer is not None:
                    for sample, own in _per_sample(batch, chosen.cpu().numpy() > 0, sets):
                        if sample.uid not in done:
                            writer.add(sample.uid, own)
                advance(sum(map(len, batch.samples)) * self.session.world.data_size)

            self._run(todo, self._wanted, selection, keep)
        return time.perf_counter() - began

    def _run(
        self,
        rows: Sequence[list[Sample]],
        wanted: Callable[[Sample], np.ndarray],
        task: Task,
        consume: Callable[[MicroBatch, Tensor], None],
    ) -> None:
        """Forward the rows, a few in flight at a time."""
        world = self.session.world
        for some in in_groups(rows, 2 * world.pipeline_size):
            positions = [[wanted(s) for s in row] for row in some]
            ids = [[s.ids for s in row] for row in some]
            share_prefixes = self.session.config.data.share_prefixes
            batches = micro_batches(
                ids, positions, world.torch_device, multiple=world.tensor_size, share_prefixes=share_prefixes
            )
            batches = [dataclasses.replace(batch, samples=row) for batch, row in zip(batches, some, strict=True)]
            self.shared += sum(batch.shared for batch in batches)
            forward(self.session.model, batches, task, consume=consume)


def _bucket_chooser(rule: BucketRule) -> Chooser:
    """Keep each position with the rate of its confidence bucket, decided by a hash of seed, sample and position."""
    rates = np.asarray(rule.rates)

    def choose(batch: MicroBatch, confidence: np.ndarray) -> np.ndarray:
        pairs = zip(batch.samples, batch.positions, strict=True)
        uniform = np.concatenate([position_uniform(rule.seed, sample.uid, positions) for sample, positions in pairs])
        return uniform < rates[bucket_of(confidence, rule.edges)]

    return choose


def _per_sample(batch: MicroBatch, chosen: np.ndarray, sets: CandidateSets) -> list[tuple[Sample, SampleSets]]:
    """Cut a micro-batch's sets into its samples'.

    A sample none of whose positions was chosen is stored empty, so that it counts as done.
    """
    assert sets.logits is not None  # they show the writer which gold tokens were appended
    sets = sets.to("cpu")
    found, begin_row, begin_flag = [], 0, 0
    for sample, positions in zip(batch.samples, batch.positions, strict=True):
        picked = positions[chosen[begin_flag : begin_flag + len(positions)]]
        end_row = begin_row + len(picked)
        columns = {name: column.numpy() for name, column in sets.rows(begin_row, end_row).columns().items()}
        found.append((sample, SampleSets(positions=picked.astype(np.int32), **columns)))
        begin_row, begin_flag = end_row, begin_flag + len(positions)
    return found


def _summary(path: str, seconds: float, tokens: int, shared: int) -> str:
    manifest = CandidateStore.open(path).manifest
    counts = manifest.counts
    return (
        f"{path}: {counts['samples']} samples, {counts['positions']} positions, {counts['ids']} ids; {tokens} tokens"
        f"{f' ({shared} of them shared)' if shared else ''} in {seconds:.1f} s"
    )
