"""The source of a model: a Hugging Face folder, or a checkpoint of ours.

Both give the model's shape and its tokenizer, and fill a built model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_replay.config import Adapter, Layout, build
from megatron_replay.errors import CheckpointError, ConfigError
from megatron_replay.formats.hf_folder import HFFolder, sha256_file
from megatron_replay.formats.torch_dist import Reader, is_checkpoint, resolve
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.mcore.lora_layers import merge_into
from megatron_replay.parallel.mcore.model import Model, load_hf


@dataclass(frozen=True)
class Source:
    path: Path

    @classmethod
    def open(cls, path: str) -> Source:
        """The source at a path. Raises ConfigError for an empty path, CheckpointError when there is no model."""
        if not path:
            raise ConfigError("model is not set; give a Hugging Face folder or a checkpoint folder: model=PATH")
        source = cls(Path(path))
        source.spec  # noqa: B018 - a missing or unknown model is reported before anything starts
        return source

    @cached_property
    def is_checkpoint(self) -> bool:
        return is_checkpoint(self.path)

    @cached_property
    def hf(self) -> Path:
        """The folder with config.json and the tokenizer."""
        if not self.is_checkpoint:
            return self.path
        root = self.path if (self.path / "hf").is_dir() else self.path.parent
        return root / "hf"

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_hf(self.hf)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The notes of `convert` or `train` on the checkpoint's weights (source.json).

        They are empty for a Hugging Face folder.
        """
        path = self.hf / "source.json"
        if not self.is_checkpoint:
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as err:
            reason = getattr(err, "strerror", None) or err
            raise CheckpointError(f"{path}: cannot be read ({reason}); convert the model again") from err

    @cached_property
    def adapter(self) -> Adapter | None:
        """The adapter that was trained beside the checkpoint's weights; `fill` and `convert` merge it."""
        noted = self.facts.get("adapter")
        # an adapter without its note would be left out without a word
        if not noted and self.is_checkpoint and Reader(self.path).has_adapter():
            raise CheckpointError(
                f"{self.path}: holds an adapter that {self.hf / 'source.json'} does not describe; restore that file"
            )
        try:
            return build(Adapter, noted) if noted else None
        except (ConfigError, TypeError, ValueError) as err:
            raise CheckpointError(
                f"{self.hf / 'source.json'}: the adapter cannot be read ({err}); restore the file"
            ) from err

    @cached_property
    def table(self) -> WeightTable:
        """The parameters as they lie in the checkpoint, an adapter's factors among them.

        Rows of the vocabulary are by id.
        """
        return WeightTable(self.spec, head_multiple=int(self.facts.get("head_multiple", 1)), adapter=self.adapter)

    def fingerprint(self) -> str:
        """sha256 that names the weights; a checkpoint converted from a Hugging Face folder has that folder's."""
        if not self.is_checkpoint:
            return HFFolder(self.path).fingerprint()
        folder = resolve(self.path)
        if folder.name == "iter_0000000":  # untouched since convert
            return str(self.facts["fingerprint"])
        files = sorted(folder.glob("*.distcp"))
        return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()

    def layout(self, wanted: Layout) -> Layout:
        """The layout with the head padding this checkpoint was written with."""
        if not self.is_checkpoint:
            return wanted
        written, asked = int(self.facts["head_multiple"]), wanted.head_multiple
        if asked not in (written, 1):
            raise CheckpointError(
                f"{self.path}: was written with layout.head_multiple={written}, this run asks for {asked}; leave it out"
            )
        return dataclasses.replace(wanted, head_multiple=written)

    def fill(self, model: Model) -> None:
        """Load the weights into this rank's built model, an adapter merged into them."""
        if self.is_checkpoint:
            checkpoint.load_model(self.path, model, self.adapter)
            if self.adapter is not None:
                merge_into(model, Reader(self.path), self.adapter)
        else:
            load_hf(model, HFFolder(self.path))
