"""The candidate store: for every sample the small set of token ids the base model found likely at each kept position.

`begin` a store, open a `Writer` for each data-parallel rank, `finish` it, and read it as a `CandidateStore`. numpy
only.
"""

from __future__ import annotations

from megatron_replay.store.compare import Comparison, Difference, compare
from megatron_replay.store.counts import Stats
from megatron_replay.store.export import export
from megatron_replay.store.files import Damage, Disk
from megatron_replay.store.finish import finish
from megatron_replay.store.format import Schema
from megatron_replay.store.manifest import Manifest, begin, has_plan, is_complete, load_manifest, load_plan
from megatron_replay.store.reader import CandidateStore
from megatron_replay.store.repair import Repaired, repair
from megatron_replay.store.sample_sets import SampleSets
from megatron_replay.store.verify import Problem, Report, verify
from megatron_replay.store.writer import Writer

__all__ = [
    "CandidateStore",
    "Comparison",
    "Damage",
    "Difference",
    "Disk",
    "Manifest",
    "Problem",
    "Repaired",
    "Report",
    "SampleSets",
    "Schema",
    "Stats",
    "Writer",
    "begin",
    "compare",
    "export",
    "finish",
    "has_plan",
    "is_complete",
    "load_manifest",
    "load_plan",
    "repair",
    "verify",
]
