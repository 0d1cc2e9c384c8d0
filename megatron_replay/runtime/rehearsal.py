"""Rehearsal: a run holds itself to the base model's stored distributions, at texts that the base model wrote.

L = mean over the domain's positions + weight * mean over the texts' positions of KL(base || model); docs/rehearsal.md
says why. A rehearsal folder holds `texts.jsonl` (`data.texts`), the store of their sets in `store`,
and where asked for the store of the domain's prompts in `prompts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_replay import config as configs
from megatron_replay.data.packing import Stream
from megatron_replay.data.samples import Sample, make_sample
from megatron_replay.data.texts import FINGERPRINT, load_texts
from megatron_replay.errors import ConfigError, DataError, LayoutError
from megatron_replay.parallel.activations import LargestMicroBatch
from megatron_replay.parallel.inference import fill
from megatron_replay.parallel.losses import LOSSES, Loss
from megatron_replay.parallel.losses.kl import KL
from megatron_replay.parallel.ranks.world import World
from megatron_replay.runtime.draws import Draw, Part
from megatron_replay.runtime.identity import check_store
from megatron_replay.runtime.session import Session
from megatron_replay.store import CandidateStore

SETS, PROMPT_SETS = "store", "prompts"
"""The stores of a rehearsal folder."""

TEXTS, PROMPTS = "rehearsal", "prompts"
"""The terms of the loss; `rehearsal/kl` is the mean of one in the log."""


@dataclass
class Rehearsal:
    """The texts of a run, those of each step, and their loss."""

    config: configs.Rehearsal
    seed: int
    loss: Loss
    samples: list[Sample]
    store: CandidateStore
    prompts: CandidateStore | None = None
    """The sets of the domain's prompts, where they are rehearsed too."""
    stream: Stream = field(init=False)
    """The texts of all steps, one a row."""
    _known: dict[bytes, bytes] = field(default_factory=dict)

    def name(self, term: str) -> str:
        """The name of a term, which the log shows: kl for divergences from the base model, nll for other losses."""
        return f"{term}/{'kl' if isinstance(self.loss, KL) else 'nll'}"

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term's mean."""
        return {self.name(TEXTS): self.config.weight, self.name(PROMPTS): self.config.prompts}

    def plan(self, tokens: float, replicas: int) -> None:
        """Fix the texts of a step, from the domain's tokens in one. Raises LayoutError for fewer than replicas."""
        lengths = [len(sample) for sample in self.samples]
        count = max(1, round(self.config.share * tokens * len(lengths) / sum(lengths)))
        if count < replicas:
            raise LayoutError(
                f"rehearsal.share={self.config.share:g} gives {count} texts a step, which cannot be dealt to "
                f"{replicas} data-parallel replicas; raise it, and rehearsal.every with it"
            )
        self.stream = Stream(lengths, self.seed, max(lengths), False, True, count)

    def texts(self, step: int) -> list[Sample]:
        """The texts of a step, of all replicas; none in a step that is not the n-th."""
        if step % self.config.every or not self.config.weight:
            return []
        return [self.samples[i] for row in self.stream.batch(step // self.config.every) for i in row]

    def counts(self, step: int, drawn: Sequence[Sample]) -> dict[str, int]:
        """The positions of each term in a step whose domain samples are `drawn`."""
        prompts = 0 if self.prompts is None else sum(map(self._num_prompt_positions, drawn))
        texts = sum(len(sample.positions) for sample in self.texts(step))
        return {self.name(TEXTS): texts, self.name(PROMPTS): prompts}

    def mixed(self, step: int, draws: Sequence[Draw], world: World, *, capacity: int) -> list[Draw]:
        """This replica's micro-batches of a step: those of the domain, with their prompts, and those of the texts.

        Texts are laid together up to `capacity` tokens.
        """
        mine = self.texts(step)[world.data_rank :: world.data_size]
        rows = fill(range(len(mine)), [len(text) for text in mine], capacity)
        return [self._with_prompts(draw) for draw in draws] + [self._draw([mine[i] for i in row]) for row in rows]

    def _draw(self, texts: list[Sample]) -> Draw:
        stored = [self.store[text.uid] for text in texts]
        return Draw(texts, (Part(self.name(TEXTS), self.loss, [sets.positions for sets in stored], stored),))

    def _with_prompts(self, draw: Draw) -> Draw:
        if self.prompts is None:
            return draw
        stored = [self.prompts[self._prompt_uid(sample)] for sample in draw.samples]
        part = Part(self.name(PROMPTS), self.loss, [sets.positions for sets in stored], stored)
        return replace(draw, parts=(*draw.parts, part))

    def _num_prompt_positions(self, sample: Sample) -> int:
        assert self.prompts is not None
        return self.prompts.num_positions(self._prompt_uid(sample))

    def _prompt_uid(self, sample: Sample) -> bytes:
        if sample.uid not in self._known:
            self._known[sample.uid] = prompt_sample(sample).uid
        return self._known[sample.uid]

    def largest(self, domain: LargestMicroBatch, replicas: int) -> LargestMicroBatch:
        """The domain's largest micro-batch, made as large as those of the texts."""
        lengths = sum(len(sample) for sample in self.samples) / len(self.samples)
        texts = math.ceil(self.stream.total / replicas)
        rows = max(1, math.ceil(texts * lengths / domain.tokens))
        positions = min(domain.tokens, math.ceil(texts * lengths / rows))
        counts = self.store.manifest.counts
        candidates = math.ceil(positions * counts["ids"] / max(1, counts["positions"]))
        prompts = 0 if self.prompts is None else math.ceil(domain.tokens * self.config.fraction)
        return replace(
            domain,
            positions=max(domain.positions + prompts, positions),
            candidates=max(domain.candidates + prompts * (self.config.k_max + 1), candidates),
            micro_batches=domain.micro_batches + rows,
        )

    def describe(self) -> str:
        often = "each step" if self.config.every == 1 else f"every {self.config.every} steps"
        found = f"rehearsal of {self.stream.total} of {len(self.samples)} texts {often}, weight {self.config.weight:g}"
        return found + (f"; of the prompts, weight {self.config.prompts:g}" if self.prompts is not None else "")


def prompt_sample(sample: Sample) -> Sample:
    """The sample with the tokens of its prompt as targets: those in front of the first answer. Its uid is another."""
    mask = np.zeros(len(sample), dtype=np.bool_)
    mask[1 : int(sample.mask.argmax())] = True
    return make_sample(sample.ids, mask, FINGERPRINT, sample.source)


def open_rehearsal(session: Session, samples: Sequence[Sample]) -> Rehearsal | None:
    """The rehearsal that the configuration asks for; None where it asks for none.

    Raises ConfigError, DataError or StoreError for a folder that is unfinished, or another model's or tokenizer's.
    """
    asked = session.config.rehearsal
    if not asked.path or not (asked.weight or asked.prompts):
        return None
    folder, kind = Path(asked.path), LOSSES.get(asked.loss)
    texts = [text for text in load_texts(folder) if len(text.positions)]
    if not texts:
        raise DataError(f"{folder}: no text has a token that the model wrote; remove the folder and collect again")
    store = check_store(session, str(folder / SETS), texts)
    if kind.needs_logits and store.manifest.logits == "none":
        raise ConfigError(f"{store.path}: rehearsal needs the base model's logits; collect again with rehearsal.logits")
    prompts = None
    if asked.prompts:
        if not (folder / PROMPT_SETS).exists():
            raise ConfigError(
                f"rehearsal.prompts={asked.prompts:g}: {folder} holds no sets of prompts; run collect with that key "
                "first"
            )
        prompts = check_store(session, str(folder / PROMPT_SETS), [prompt_sample(sample) for sample in samples])
    loss = kind(session.model, session.vocab_size, session.config.kernels)
    return Rehearsal(asked, session.config.seed, loss, texts, store, prompts)
