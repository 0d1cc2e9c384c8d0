"""Stage 1: fine-tune with a loss of `parallel.losses`: the one restricted to the stored candidate sets, or another."""

from __future__ import annotations

from megatron_replay.config import RunConfig
from megatron_replay.runtime import memory_table as memory
from megatron_replay.runtime.session import open_session
from megatron_replay.runtime.training import check_run, prepare, train


def run(config: RunConfig, *, dry_run: bool = False) -> int:
    """Train and save; returns the exit code (0, or 128 + n when signal n stopped it after saving)."""
    check_run(config)
    with open_session(config, seq_length=config.data.seq_length) as session:
        feed = prepare(session)
        if dry_run:
            session.say(feed.describe())
            for name, value in feed.loss.metrics(feed.micro_batches(0)).items():
                session.say(f"{name} {value:.3f} in the first step")
            session.say("\n".join(memory.lines(memory.predicted(session, feed.largest()))))
            return 0
        return train(session, feed)
