"""The writing of rehearsal texts: the base model writes them, from the sources that the configuration names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_replay import config as configs
from megatron_replay.data.records import Message, read_records
from megatron_replay.data.samples import Sample, load_samples
from megatron_replay.data.template import ChatTemplate
from megatron_replay.data.texts import Text, TextFile, joined, load_texts
from megatron_replay.errors import ConfigError
from megatron_replay.parallel.generation import generate
from megatron_replay.parallel.sampling import Sampling
from megatron_replay.runtime.identity import model_fingerprint
from megatron_replay.runtime.session import Session

MARK = "rehearsal request"
"""It stands for a user's request, to find the text of a template around one."""

Pieces = list[tuple[Sequence[int], bool]]
"""Ids in order, and whether the model wrote them."""


def write_texts(session: Session) -> list[Sample]:
    """Write the texts that the configuration asks for, or those that are missing; returns them as samples. Collective.

    Raises ConfigError for a source that this model cannot take, DataError for a file or folder that cannot be used.
    """
    asked, world = session.config.rehearsal, session.world
    folder = Path(asked.path)
    author = _Author(session)
    about = author.about()  # by all ranks
    file = TextFile(folder, about) if world.is_main else None
    done, number = world.gather_objects((file.complete, _following(file)) if file else None)[0]
    step = asked.batch * world.data_size
    with session.progress("rehearsal texts", 0 if done else asked.samples, "texts") as advance:
        while not done:
            texts = author.texts(range(number, number + step))
            number += step
            if file is not None:
                before = len(file.texts)
                file.add(texts[: asked.samples - len(file.texts)])
                advance(len(file.texts) - before)
            # texts that repeat an earlier one are not counted, but they end somewhere
            ended = not texts or number >= 4 * asked.samples + step
            done = world.gather_objects(len(file.texts) >= asked.samples or ended if file else None)[0]
    if file is not None and not file.complete:
        file.finish()
    world.barrier()
    return load_texts(folder)


def _following(file: TextFile) -> int:
    return file.texts[-1].number + 1 if file.texts else 0


class _Author:
    """Texts by their numbers, from the sources of the configuration in turn."""

    def __init__(self, session: Session) -> None:
        self.session, self.asked = session, session.config.rehearsal
        chat = isinstance(session.template, ChatTemplate)
        self.sources = self.asked.source or (("chat",) if chat else ("free",))
        # a file that cannot be used is refused before anything is written
        _ = "prompts" in self.sources and self._prompts
        _ = "text" in self.sources and self._samples
        if "chat" in self.sources and not chat:
            raise ConfigError(
                "rehearsal.source=chat needs a chat template, and this model has none; use rehearsal.source=free"
            )

    def about(self) -> dict[str, Any]:
        """The settings on which the texts depend."""
        names = ("samples", "max_new_tokens", "temperature", "file")
        return {
            "model": model_fingerprint(self.session),
            "tokenizer": self.session.tokenizer.fingerprint,
            "template": self.session.template.fingerprint,
            "seed": self.session.config.seed,
            "source": list(self.sources),
            **{name: getattr(self.asked, name) for name in names},
        }

    def texts(self, numbers: Sequence[int]) -> list[Text]:
        """The texts of some numbers; fewer where a file ends."""
        of: dict[str, list[int]] = {kind: [] for kind in self.sources}
        for number in numbers:
            of[self.sources[number % len(self.sources)]].append(number)
        write = {"chat": self._chat, "free": self._free, "prompts": self._prompted, "text": self._given}
        found = [(number, pieces) for kind, some in of.items() for number, pieces in write[kind](some)]
        return [self._text(number, pieces) for number, pieces in sorted(found, key=lambda item: item[0])]

    def _text(self, number: int, pieces: Pieces) -> Text:
        ids, written = joined(pieces)
        return Text(number, ids, written, self.session.tokenizer.decode(list(ids), special=True))

    def _chat(self, numbers: Sequence[int]) -> Iterator[tuple[int, Pieces]]:
        """A request that the model writes in the user's place, and its answer."""
        template, tokenizer = self.session.template, self.session.tokenizer
        before, found, after = template.render([Message("user", MARK)], add_generation_prompt=True).partition(MARK)
        if not found or not before:
            raise ConfigError(
                "rehearsal.source=chat: the chat template shows nothing in front of a user's request; use "
                "rehearsal.source=free"
            )
        start, between = tokenizer.encode(before), tokenizer.encode(after, continues=True)
        stops = set(self.session.stop_ids)
        requests = self._continued([start] * len(numbers), numbers, stage=0)
        ended = [bool(request) and request[-1] in stops for request in requests]
        bodies = [request[:-1] if end else request for request, end in zip(requests, ended, strict=True)]
        # the end of a turn is the model's own token, where the template ends a turn with that token
        own = 1 if between[:1] and between[0] in stops else 0
        prompts = [[*start, *body, *between] for body, end in zip(bodies, ended, strict=True) if end]
        asked = [number for number, end in zip(numbers, ended, strict=True) if end]
        answers = dict(zip(asked, self._continued(prompts, asked, stage=1), strict=True))
        for number, body, end in zip(numbers, bodies, ended, strict=True):
            pieces: Pieces = [(start, False), (body, True)]
            if end:
                pieces = [(start, False), (body + between[:own], True), (between[own:], False), (answers[number], True)]
            yield number, pieces

    def _free(self, numbers: Sequence[int]) -> Iterator[tuple[int, Pieces]]:
        """Text from nothing: behind bos, or behind the last end token where the tokenizer has no bos."""
        tokenizer = self.session.tokenizer
        if tokenizer.bos_id is None and not tokenizer.eos_ids:
            raise ConfigError("rehearsal.source=free begins with bos or eos, and the tokenizer names neither")
        start = [tokenizer.eos_ids[-1] if tokenizer.bos_id is None else tokenizer.bos_id]
        for number, written in zip(numbers, self._continued([start] * len(numbers), numbers), strict=True):
            yield number, [(start, False), (written, True)]

    def _prompted(self, numbers: Sequence[int]) -> Iterator[tuple[int, Pieces]]:
        """The model's answers to the prompts of a file, which are taken again and again."""
        some = [self._prompts[number // len(self.sources) % len(self._prompts)] for number in numbers]
        for number, prompt, answer in zip(numbers, some, self._continued(some, numbers), strict=True):
            yield number, [(prompt, False), (answer, True)]

    def _given(self, numbers: Sequence[int]) -> Iterator[tuple[int, Pieces]]:
        """The texts of a file, each once."""
        for number in numbers:
            at = number // len(self.sources)
            if at < len(self._samples):
                sample = self._samples[at]
                edges = np.flatnonzero(np.diff(sample.mask)) + 1
                parts = np.split(np.arange(len(sample)), edges)
                yield number, [(sample.ids[part].tolist(), bool(sample.mask[part[0]])) for part in parts]

    def _continued(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], *, stage: int = 0
    ) -> list[list[int]]:
        """The model's continuations of prompts, whose draws are those of the texts' numbers."""
        if not prompts:
            return []
        session, asked = self.session, self.asked
        # the two parts of a text have draws of their own
        seed = session.config.seed + (stage << 32)
        return generate(
            session.model,
            prompts,
            max_new_tokens=asked.max_new_tokens,
            stop_ids=session.stop_ids,
            vocab_size=session.vocab_size,
            batch=asked.batch,
            sampling=Sampling(asked.temperature, seed, tuple(numbers)),
            keep_stop=True,
        )

    @cached_property
    def _prompts(self) -> list[list[int]]:
        found = []
        for record in read_records(self.asked.file, targets=False):
            if record.text is not None:
                found.append(self.session.tokenizer.encode(record.text))
            else:
                found.append(self.session.template.prompt(record.prompt))
        return found

    @cached_property
    def _samples(self) -> list[Sample]:
        data = configs.Data(path=self.asked.file, seq_length=self.session.config.data.seq_length)
        return load_samples(data, self.session.tokenizer, template=self.session.template)
