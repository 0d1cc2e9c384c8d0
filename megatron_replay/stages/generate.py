"""Continue a prompt greedily, with a key/value cache, on any layout."""

from __future__ import annotations

from megatron_replay.config import RunConfig
from megatron_replay.data.records import Message
from megatron_replay.errors import ConfigError
from megatron_replay.parallel.generation import generate
from megatron_replay.runtime.session import Session, open_session


def run(config: RunConfig) -> None:
    """Print the continuation of `generate.prompt`."""
    if not config.generate.prompt:
        raise ConfigError('no prompt; write it after the verb in quotes, or set generate.prompt="..."')
    with open_session(config, seq_length=config.data.seq_length) as session:
        session.say(text(session))


def text(session: Session) -> str:
    asked = session.config.generate
    tokenizer = session.tokenizer
    if asked.raw:
        start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
        prompt = start + tokenizer.encode(asked.prompt)
    else:
        prompt = session.template.prompt([Message("user", asked.prompt)])
    if not prompt:
        raise ConfigError("the prompt has no tokens")
    (answer,) = generate(
        session.model,
        [prompt],
        max_new_tokens=asked.max_new_tokens,
        stop_ids=session.stop_ids,
        vocab_size=session.vocab_size,
        batch=1,
    )
    return (asked.prompt if asked.raw else "") + tokenizer.decode(answer)
