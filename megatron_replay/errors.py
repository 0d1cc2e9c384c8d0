"""The errors of a user's input, one class per kind. The message names the thing, the value, and the way out.

The command line turns any of these into one line on stderr and exit code 2. Everything else is a fault of ours (exit
code 1).
"""

from __future__ import annotations


class ReplayError(Exception):
    """The input cannot be used; nothing was lost."""


class ConfigError(ReplayError, ValueError):
    """A configuration key or value that cannot be used."""


class DataError(ReplayError, ValueError):
    """A data file, tokenizer or template that cannot be read as asked."""


class StoreError(ReplayError):
    """A candidate store that is missing, damaged, or belongs to another run."""


class CheckpointError(ReplayError):
    """A checkpoint or Hugging Face folder that is missing, damaged, or of another model."""


class LayoutError(ReplayError, ValueError):
    """Ranks that do not divide what they should divide."""


class DeviceError(ReplayError, RuntimeError):
    """A device that was asked for and is not there."""


def brief(value: object) -> str:
    """A value as a message shows it: of a text, such as a fingerprint, the first twelve letters."""
    return value[:12] if isinstance(value, str) else str(value)
