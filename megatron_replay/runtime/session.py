"""The session in which every verb that runs a model works: device, ranks, model and tokenizer.

Wrong input is found early: all checks that need no ranks come before the ranks start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch

from megatron_replay.config import RunConfig
from megatron_replay.data.template import Template, load_template
from megatron_replay.data.tokenizer import Tokenizer, load_tokenizer
from megatron_replay.device import choose, dtype
from megatron_replay.errors import DataError
from megatron_replay.kernels.loading import check_mode
from megatron_replay.models.layout import validate_layout
from megatron_replay.parallel.checkpoints.source import Source
from megatron_replay.parallel.mcore.model import Model, build
from megatron_replay.parallel.ranks import world as worlds
from megatron_replay.parallel.ranks.world import World
from megatron_replay.runtime.progress import Advance, progress

log = logging.getLogger(__name__)


@dataclass
class Session:
    config: RunConfig
    source: Source
    tokenizer: Tokenizer
    template: Template
    world: World
    model: Model

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows: the real vocabulary. Rows beyond it are padding and never take part."""
        return self.tokenizer.size

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer (`Template.stop_ids`)."""
        return self.template.stop_ids

    def say(self, text: str) -> None:
        """Print once, not on every rank."""
        if self.world.is_main:
            print(text, flush=True)

    def progress(self, what: str, total: float, unit: str) -> AbstractContextManager[Advance]:
        """Progress shown by the main rank, `total` being the work of all replicas."""
        return progress(what, total, unit, shown=self.world.is_main)


@contextmanager
def open_session(config: RunConfig, *, seq_length: int) -> Iterator[Session]:
    """Start the ranks, and build and fill the model. Raises ReplayError for input that cannot be used."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    source = Source.open(config.model)
    layout = source.layout(config.layout)
    validate_layout(source.spec, layout)
    tokenizer = load_tokenizer(config.tokenizer or source.hf)
    if tokenizer.size > source.spec.vocab_size:
        raise DataError(
            f"{config.tokenizer or source.hf}: the tokenizer knows {tokenizer.size} ids, the model has "
            f"{source.spec.vocab_size} rows; use the model's own tokenizer"
        )
    template = load_template(config.data.template, tokenizer)
    device = choose(config.device)
    weights_dtype = dtype(config.precision, device)
    check_mode(config.kernels)  # an unknown mode is reported before the ranks start
    torch.manual_seed(config.seed)
    with worlds.running(layout, device, seed=config.seed) as world:
        if world.is_main:
            _compare_ends(template, tokenizer)
        model = build(source.spec, layout, world, weights_dtype, seq_length=seq_length)
        source.fill(model)
        yield Session(config, source, tokenizer, template, world, model)


def _compare_ends(template: Template, tokenizer: Tokenizer) -> None:
    """Warn where replies end with a token that the model's files do not name: other programs would run on."""
    end = template.turn_end
    if end is not None and end not in tokenizer.eos_ids:
        names = [f"{tokenizer.decode([i], special=True)} ({i})" for i in (end, *tokenizer.eos_ids)]
        log.warning(
            "replies end with %s, and the model's files name %s as eos; generation stops at either, and checkpoints "
            "name both in generation_config.json",
            names[0],
            ", ".join(names[1:]) or "nothing",
        )
