"""Data files to samples: token ids, target marks, and the uid under which a store keeps the candidate sets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megatron_replay import config
from megatron_replay.data.records import Record, read_records
from megatron_replay.data.template import Template, load_template
from megatron_replay.data.tokenizer import Tokenizer
from megatron_replay.errors import DataError

log = logging.getLogger(__name__)

TEXT_FINGERPRINT = hashlib.sha256(b"text 1").hexdigest()
"""The fingerprint that stands for the template in the uids of plain text, which no template touches."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One sequence to train on."""

    uid: bytes
    """Hash of ids, mask and template, 16 bytes."""
    ids: NDArray[np.int32]
    """[n]"""
    mask: NDArray[np.bool_]
    """[n], true where the token is a target; never at 0."""
    source: str
    """file:line"""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """Positions [targets], ascending. Position p predicts ids[p + 1], which is a target."""
        return np.flatnonzero(self.mask[1:]).astype(np.int32)


def make_sample(
    ids: NDArray[np.int32],
    mask: NDArray[np.bool_],
    template: str,
    source: str = "",
    extra: Mapping[str, Any] | None = None,
) -> Sample:
    """A sample with its uid.

    The uid is the xxh3-128 hash of the length, the ids (int32, little endian), the mask (bits) and the template's
    fingerprint.
    """
    ids = np.ascontiguousarray(ids, dtype=np.int32)
    digest = xxhash.xxh3_128(len(ids).to_bytes(8, "little"))
    digest.update(ids.astype("<i4").tobytes())
    digest.update(np.packbits(mask).tobytes())
    digest.update(template.encode())
    return Sample(digest.digest(), ids, np.ascontiguousarray(mask, dtype=np.bool_), source, extra or {})


def load_samples(data: config.Data, tokenizer: Tokenizer, *, template: Template | None = None) -> list[Sample]:
    """Read `data.path` into samples, in file order. `template` defaults to the one that `data.template` names.

    Samples longer than `data.seq_length` are an error, dropped, or cut, as `data.over_length` says. A document is cut
    into windows of that length. Each window begins with the last token of the one before, so every token but the
    document's first is predicted once.

    Identical samples are all kept, because training sees each as often as the data holds it. A warning counts them;
    `unique` drops them for collect. Raises DataError, naming file and line, for bad input, and when nothing is left.
    """
    template = template or load_template(data.template, tokenizer)
    reader = _Reader(data, tokenizer, template)
    samples: list[Sample] = []
    for sample in reader.samples():
        samples.append(sample)
        if len(samples) == data.limit:
            break
    reader.report(len(samples), len(samples) - len(unique(samples)))
    if not samples:
        raise DataError(
            f"{data.path}: all {reader.num_dropped} samples are longer than data.seq_length={data.seq_length}; "
            "raise it, or set data.over_length=truncate"
        )
    return samples


def unique(samples: Sequence[Sample]) -> list[Sample]:
    """The first sample of each uid, in order: the ones that collect needs."""
    first: dict[bytes, Sample] = {}
    for sample in samples:
        first.setdefault(sample.uid, sample)
    return list(first.values())


def fingerprint(samples: Sequence[Sample]) -> str:
    """sha256 over the uids in order. It stands for the data set as this tokenizer and template see it."""
    return hashlib.sha256(b"".join(sample.uid for sample in samples)).hexdigest()


class _Reader:
    def __init__(self, data: config.Data, tokenizer: Tokenizer, template: Template) -> None:
        self.data, self.tokenizer, self.template = data, tokenizer, template
        self.num_dropped = self.num_cut = self.num_skipped = 0

    def samples(self) -> Iterator[Sample]:
        for record in read_records(self.data.path, self.data.format):
            try:
                if record.text is not None:
                    yield from self._windows(record, record.text)
                elif (sample := self._conversation(record)) is not None:
                    yield sample
            except DataError as err:
                raise DataError(f"{record.where}: {err}") from err

    def _conversation(self, record: Record) -> Sample | None:
        ids, mask, skipped = self.template.encode(record.messages)
        self.num_skipped += skipped
        limit = self.data.seq_length
        if len(ids) > limit:
            if self.data.over_length == "error":
                raise DataError(
                    f"{len(ids)} tokens, but data.seq_length is {limit}; raise it, or set data.over_length=drop or "
                    "truncate"
                )
            if self.data.over_length == "drop":
                self.num_dropped += 1
                return None
            ids, mask = ids[:limit], mask[:limit]
            self.num_cut += 1
            if not mask.any():
                raise DataError(
                    f"cut to data.seq_length={limit} tokens it has no target left; raise data.seq_length, or set "
                    "data.over_length=drop"
                )
        return make_sample(ids, mask, self.template.fingerprint, record.where, record.extra)

    def _windows(self, record: Record, text: str) -> Iterator[Sample]:
        start = [self.tokenizer.bos_id] if self.tokenizer.add_bos and self.tokenizer.bos_id is not None else []
        ids = np.asarray(start + self.tokenizer.encode(text), dtype=np.int32)
        size = self.data.seq_length
        if len(ids) < 2:
            raise DataError("the text is a single token, so there is nothing to predict; remove it")
        if size < 2:
            raise DataError(f"data.seq_length={size} leaves nothing to predict in a window of text; set at least 2")
        for first in range(0, len(ids) - 1, size - 1):
            window = ids[first : first + size]
            yield make_sample(window, np.arange(len(window)) > 0, TEXT_FINGERPRINT, record.where, record.extra)

    def report(self, num_samples: int, num_repeated: int) -> None:
        """Warn, once each, of everything done to the data that is not an error."""
        path, size = self.data.path, self.data.seq_length
        if self.num_dropped:
            log.warning(
                "%s: dropped %d samples longer than %d tokens, kept %d", path, self.num_dropped, size, num_samples
            )
        if self.num_cut:
            log.warning("%s: cut %d samples to %d tokens", path, self.num_cut, size)
        if self.num_skipped:
            log.warning(
                "%s: %d earlier assistant turns are context only: the chat template shows them otherwise than it "
                "would generate them",
                path,
                self.num_skipped,
            )
        if num_repeated:
            log.warning("%s: %d of %d samples repeat an earlier one", path, num_repeated, num_samples)
