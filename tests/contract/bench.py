"""A folder with copies of the tiny model, data and store, in which a test spoils something and runs what must be
refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from served import Served
from tinymodel import SETTINGS, Tiny


class Evil:
    """A pickle that makes a file where the command runs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


@dataclass
class Bench:
    """A folder to spoil things in, and what is in it: copies of the tiny model, data and store."""

    folder: Path
    served: Served
    tiny: Tiny
    model: Path = field(init=False)
    data: Path = field(init=False)
    store: Path = field(init=False)

    def __post_init__(self) -> None:
        self.model = Path(shutil.copytree(self.tiny.model, self.folder / "model"))
        self.store = Path(shutil.copytree(self.tiny.store, self.folder / "store"))
        self.data = Path(shutil.copy(self.tiny.data, self.folder / "data.jsonl"))

    def refused(self, verb: str, *argv: str, out: bool = False) -> str:
        """Run what must be refused; returns its one line.

        Nothing in the folder may change, and (without `out`) nothing be printed.
        """
        before = snapshot(self.folder)
        done = self.served(*self.command(verb, *argv), cwd=self.folder)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert done.err.startswith("megatron-replay") and "Traceback" not in done.err
        assert out or done.out == ""
        assert snapshot(self.folder) == before
        return done.err.strip()

    def command(self, verb: str, *argv: str) -> list[str]:
        given = {
            "collect": ("model=model", "data.path=data.jsonl", "collect.store=new", *SETTINGS),
            "train": ("model=model", "data.path=data.jsonl", "train.store=store", "output=out", *SETTINGS),
            "evaluate": ("model=model", *SETTINGS),
            "generate": ("model=model", *SETTINGS),
        }.get(verb, ())
        return [verb, *given, *argv]

    def config(self, **changes: Any) -> None:
        """Change keys of the model's config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        path = self.model / "model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    def segment(self) -> Path:
        return next((self.store / "segments").glob("*.mrs"))


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
