"""Stage 0: run the base model once, forward only, and store the candidate set of each chosen position.

The source is arXiv 2510.09152, section 2. With `rehearsal.path` the model also writes texts of its own, whose sets are
stored with their logits, and those of the domain's prompts where they are rehearsed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_replay.config import Collect, RunConfig
from megatron_replay.data.samples import Sample, load_samples, unique
from megatron_replay.errors import ConfigError
from megatron_replay.runtime.collection import Collection
from megatron_replay.runtime.output_paths import check_folder
from megatron_replay.runtime.rehearsal import PROMPT_SETS, SETS, prompt_sample
from megatron_replay.runtime.session import Session, open_session
from megatron_replay.runtime.writing import write_texts


def run(config: RunConfig, *, dry_run: bool = False) -> None:
    """Collect into `collect.store` and `rehearsal.path`.

    With dry_run predict the store's size and time from a small sample, and write nothing.
    """
    wants_prompts = bool(config.rehearsal.path and config.rehearsal.prompts)
    if not (config.collect.store or config.rehearsal.path):
        raise ConfigError(
            "collect.store is not set; give the folder the candidate store goes to: collect.store=PATH (and, for texts "
            "to rehearse, rehearsal.path=PATH)"
        )
    if config.rehearsal.path:
        check_folder(config.rehearsal.path, "rehearsal.path")
    with open_session(config, seq_length=config.data.seq_length) as session:
        samples: list[Sample] = []
        if config.collect.store or wants_prompts:
            samples = unique(load_samples(config.data, session.tokenizer, template=session.template))
        if config.collect.store:
            collection = Collection(session, samples)
            collection.predict() if dry_run else collection.collect()
        if config.rehearsal.path and not dry_run:
            _rehearsal(session, write_texts(session), SETS)
        if wants_prompts and not dry_run:
            _rehearsal(session, [prompt_sample(sample) for sample in samples], PROMPT_SETS)


def _rehearsal(session: Session, samples: list[Sample], folder: str) -> None:
    """Collect the sets of texts, or of prompts, at all targets or at a share of them."""
    asked = session.config.rehearsal
    collect = Collect(
        store=str(Path(asked.path) / folder),
        tau=asked.tau,
        k_max=asked.k_max,
        logits=asked.logits,
        strategy="all" if folder == SETS else "random",
        fraction=asked.fraction,
        chunk_rows=session.config.collect.chunk_rows,
    )
    config = dataclasses.replace(session.config, collect=collect)
    Collection(dataclasses.replace(session, config=config), unique(samples)).collect()
