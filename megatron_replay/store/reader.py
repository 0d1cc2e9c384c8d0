"""Reading a complete store: any sample, any order, by uid; blocks are checked the first time they are touched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_replay.errors import StoreError
from megatron_replay.store import block as blocks
from megatron_replay.store.counts import Stats
from megatron_replay.store.files import Damage
from megatron_replay.store.format import UID_BYTES, block_at
from megatron_replay.store.manifest import Manifest, load_manifest
from megatron_replay.store.sample_sets import SampleSets
from megatron_replay.store.segment import Index, Segment
from megatron_replay.store.verify import Report, open_listed, verify

CACHED_BLOCKS = 16
"""Decoded blocks kept: a few MiB, so that neighbours in the data need no second decoding."""


class CandidateStore:
    """A mapping from sample uid (16 bytes) to SampleSets, memory-mapped.

    It is not for several threads at once, but a fork may inherit it.
    """

    def __init__(self, path: Path, manifest: Manifest, segments: list[Segment], indexes: list[Index]) -> None:
        self.path, self.manifest = path, manifest
        self._segments, self._indexes = segments, indexes
        counts = [len(index.samples) for index in indexes]
        self._first = blocks.starts_of(np.array(counts, np.int64))
        uids = np.concatenate([np.zeros((0, UID_BYTES), np.uint8), *(index.samples["uid"] for index in indexes)])
        self._uids = np.ascontiguousarray(uids)
        words = self._uids.view(">u8").astype(np.uint64).reshape(-1, 2)
        self._order = np.lexsort((words[:, 1], words[:, 0]))
        self._high = words[self._order, 0]
        self._checked: list[set[int]] = [set() for _ in segments]
        self._cache: OrderedDict[tuple[int, int], blocks.SampleBlock] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path) -> CandidateStore:
        """Open a complete store; reads the manifest and the segments' footers, no block.

        Raises StoreError where there is no store, it is unfinished, a segment is missing, or anything read is not as
        written.
        """
        root = Path(path)
        manifest = load_manifest(root)
        opened = [open_listed(root, manifest, entry) for entry in manifest.segments]
        stats = Stats()
        for _, index in opened:
            stats.merge(index.stats)
        if stats.counts() != manifest.counts:
            raise Damage(root, 0, f"the manifest counts {manifest.counts}, the segments hold {stats.counts()}")
        return cls(root, manifest, [segment for segment, _ in opened], [index for _, index in opened])

    def __len__(self) -> int:
        return len(self._uids)

    def __iter__(self) -> Iterator[bytes]:
        """Uids in the order of the files."""
        for row in self._uids:
            yield row.tobytes()

    def __contains__(self, uid: object) -> bool:
        return isinstance(uid, bytes) and self._find(uid) is not None

    def __getitem__(self, uid: bytes) -> SampleSets:
        """The sample's sets, in arrays of its own.

        Raises StoreError for an unknown uid, or for damage, naming file and byte.
        """
        at = self._find(uid)
        if at is None:
            raise StoreError(
                f"{self.path}: no sample {uid.hex()}; it was not in the data this store was collected on, or its "
                "tokens changed"
            )
        segment = int(np.searchsorted(self._first, at, side="right")) - 1
        samples = self._indexes[segment].samples
        slot = at - int(self._first[segment])
        number = int(samples["block"][slot])
        block = self._block(segment, number)
        within = slot - int(np.searchsorted(samples["block"], number))
        if block.uids[within] != uid:
            raise Damage(
                self._segments[segment].path,
                int(self._indexes[segment].blocks["offset"][number]),
                f"holds no sample {uid.hex()}",
            )
        return block.sample(within)

    def num_positions(self, uid: bytes) -> int:
        """Stored positions of a sample, from the index alone. Raises StoreError for an unknown uid."""
        at = self._find(uid)
        if at is None:
            raise StoreError(f"{self.path}: no sample {uid.hex()}")
        segment = int(np.searchsorted(self._first, at, side="right")) - 1
        return int(self._indexes[segment].samples["positions"][at - int(self._first[segment])])

    def stats(self) -> Stats:
        """Counts of the whole store, from the segments' footers."""
        stats = Stats()
        for index in self._indexes:
            stats.merge(index.stats)
        return stats

    def verify(self) -> Report:
        """Read every byte and check it; see `verify.verify`."""
        return verify(self.path)

    def _find(self, uid: bytes) -> int | None:
        if len(uid) != UID_BYTES:
            return None
        at = int(np.searchsorted(self._high, np.uint64(int.from_bytes(uid[:8], "big"))))
        high = np.uint64(int.from_bytes(uid[:8], "big"))
        while at < len(self._high) and self._high[at] == high:
            row = int(self._order[at])
            if self._uids[row].tobytes() == uid:
                return row
            at += 1
        return None

    def _block(self, segment: int, number: int) -> blocks.SampleBlock:
        key = (segment, number)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        source, row = self._segments[segment], self._indexes[segment].blocks[number]
        offset, size = int(row["offset"]), int(row["bytes"])
        if number in self._checked[segment]:
            part = source.view[offset : offset + size]
        else:
            part = block_at(source.path, source.view[offset:], offset)
            self._checked[segment].add(number)
        self._cache[key] = block = blocks.decode(source.path, part, offset, source.schema)
        if len(self._cache) > CACHED_BLOCKS:
            self._cache.popitem(last=False)
        return block
