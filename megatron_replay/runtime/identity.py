"""The identity of a store: one model, tokenizer, template and data set.

A run with others is refused before its first step.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_replay.data.samples import Sample
from megatron_replay.errors import StoreError, brief
from megatron_replay.runtime.session import Session
from megatron_replay.store import CandidateStore, verify


def model_fingerprint(session: Session) -> str:
    """The fingerprint of the model, computed by one rank because it reads every byte of the weights."""
    return str(session.world.gather_objects(session.source.fingerprint() if session.world.is_main else "")[0])


def check_store(session: Session, path: str, samples: Sequence[Sample]) -> CandidateStore:
    """Open the store and check that it was collected with this model, tokenizer and template, and holds every sample.

    Every byte of the store is read and checked first. Raises StoreError naming file and byte of damage, both
    fingerprints, or the first sample that is not in the store.
    """
    store = CandidateStore.open(path)
    damage = [str(problem) for problem in verify(path).problems[:1]] if session.world.is_main else []
    for problem in session.world.gather_objects(damage)[0]:  # better now than in the middle of the run
        raise StoreError(f"{problem}; run `store repair` and then collect again")
    manifest = store.manifest
    pairs = {
        "tokenizer": (manifest.tokenizer, session.tokenizer.fingerprint),
        "chat template": (manifest.template, session.template.fingerprint),
        "vocabulary size": (manifest.vocab_size, session.vocab_size),
        "base model": (manifest.model, model_fingerprint(session)),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise StoreError(
                f"{path}: collected with {what} {brief(theirs)}, but this run has {brief(ours)}; use the same, or "
                "collect again"
            )
    for sample in samples:
        if sample.uid not in store:
            raise StoreError(
                f"{sample.source}: this sample is not in {path} (its tokens changed, or it was not collected); "
                "collect again with this data file"
            )
    return store
