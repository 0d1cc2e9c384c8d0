"""The description that a store carries: `plan.json` from its first moment, `manifest.json` once it is complete.

The plan holds the settings that every resumed run must have too. Both are written atomically and end in a checksum of
their own text.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_replay.candidates import CandidateRule
from megatron_replay.errors import StoreError
from megatron_replay.store.files import Damage, Disk, disk_errors
from megatron_replay.store.format import VERSION, VERSIONS, Codec, Logits, Schema

MANIFEST, PLAN, JOURNAL, SEGMENTS = "manifest.json", "plan.json", "journal.jsonl", "segments"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a later run must know of how a store was collected.

    The fields up to `bucket_edges` are its identity.
    """

    model: str
    """sha256 over the base model's safetensors files."""
    tokenizer: str
    template: str
    dataset: str
    vocab_size: int
    """Real vocabulary: no stored id reaches it."""
    vocab_padded: int
    tau: float
    k_max: int
    min_set_size: int
    strategy: str
    fraction: float
    buckets: int
    seed: int
    dtype: str
    """Type of the base model's forward pass: fp32, bf16, ..."""
    always: tuple[int, ...] = ()
    """Ids that are in every set, beside the gold one; not written where there are none."""
    codec: Codec = "zd"
    logits: Logits = "none"
    bucket_edges: tuple[float, ...] = ()
    """Upper confidence edges of all buckets but the last."""
    bucket_counts: tuple[int, ...] = ()
    """Positions of each bucket among those that gave the edges; they set the rate at which each bucket is kept."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Ranks and batch the store was collected with; a run of any other layout may read it or go on with it."""
    versions: dict[str, str] = field(default_factory=dict)
    state: str = "unfinished"
    format_version: int = VERSION
    counts: dict[str, int] = field(default_factory=dict)
    """samples, positions, ids."""
    histograms: dict[str, Any] = field(default_factory=dict)
    """Set sizes, rho, and the capped, gold-appended and size-one fractions (`counts.Stats.summary`)."""
    segments: tuple[dict[str, Any], ...] = ()
    """name, bytes, check (of the seal) and samples of each segment file, by name."""

    @property
    def schema(self) -> Schema:
        return Schema(self.vocab_size, self.codec, self.logits, self.format_version)

    @property
    def rule(self) -> CandidateRule:
        return CandidateRule(tau=self.tau, k_max=self.k_max, min_set_size=self.min_set_size, always=self.always)

    def identity(self) -> dict[str, Any]:
        """The settings that must be equal for two runs to write one store."""
        names = [f.name for f in dataclasses.fields(self)]
        plain = json.loads(json.dumps(_fields(self)))
        return {name: plain[name] for name in [*names[: names.index("layout")], "format_version"]}


def begin(path: str | Path, manifest: Manifest, disk: Disk | None = None) -> Manifest:
    """Make the folder and its plan, or check that `manifest` continues the plan that is there; returns the plan.

    Called by one rank before any rank opens a Writer. Raises StoreError naming the first setting that differs and both
    values.
    """
    root, disk = Path(path), disk or Disk()
    _ = manifest.schema, manifest.rule  # those that cannot be are refused before a folder is made
    with disk_errors(root, "create the store"):
        (root / SEGMENTS).mkdir(parents=True, exist_ok=True)
    if not (root / PLAN).exists():
        if (root / MANIFEST).exists() or any((root / SEGMENTS).iterdir()):
            raise StoreError(
                f"{root}: has data but no {PLAN}, which was removed; run `store repair`, or collect into another folder"
            )
        disk.replace(root / PLAN, pack(dataclasses.replace(manifest, state="plan")))
    return agree(root, manifest)


def agree(root: Path, manifest: Manifest) -> Manifest:
    """The store's plan, which must have the identity of `manifest`. Raises StoreError otherwise."""
    plan = load_plan(root)
    ours, theirs = plan.identity(), manifest.identity()
    for key, value in ours.items():
        if value != theirs[key]:
            raise StoreError(
                f"{root}: begun with {key} {value!r}, but this run has {key} {theirs[key]!r}; "
                "use the same setting, or collect into another folder"
            )
    return plan


def has_plan(path: str | Path) -> bool:
    """True where a store was begun."""
    return (Path(path) / PLAN).exists()


def is_complete(path: str | Path) -> bool:
    """True where a collection was finished."""
    return (Path(path) / MANIFEST).exists()


def load_plan(path: str | Path) -> Manifest:
    """The settings a store was begun with (a resuming run takes its bucket edges from here). Raises StoreError."""
    return load(Path(path) / PLAN)


def load_manifest(path: str | Path) -> Manifest:
    """The manifest of a complete store. Raises StoreError where there is none, or it says otherwise."""
    root = Path(path)
    with disk_errors(root, "read"):
        finished, begun = (root / MANIFEST).exists(), (root / PLAN).exists()
    if not finished:
        if begun:
            raise StoreError(f"{root}: this store is unfinished; run collect again with the same settings to finish it")
        raise StoreError(f"{root}: no candidate store here (no {MANIFEST}); check the path, or run collect to make one")
    manifest = load(root / MANIFEST)
    if manifest.state != "complete":
        raise StoreError(
            f"{root}: this store is {manifest.state}; run collect again with the same settings to finish it"
        )
    return manifest


def pack(manifest: Manifest) -> bytes:
    """Canonical JSON, the checksum of all other text as its last key."""
    plain = json.dumps(
        _fields(manifest, leave_out=() if manifest.always else ("always",)),
        indent=1,
        ensure_ascii=True,
        allow_nan=False,
    ).encode()
    return plain[:-2] + _tail(plain)


def _fields(manifest: Manifest, leave_out: Collection[str] = ()) -> dict[str, Any]:
    return {f.name: getattr(manifest, f.name) for f in dataclasses.fields(manifest) if f.name not in leave_out}


def _tail(plain: bytes) -> bytes:
    """The checksum of a JSON text, to stand in place of its last newline and brace."""
    return f',\n "checksum": "{xxhash.xxh3_64_hexdigest(plain)}"\n}}\n'.encode()


def load(path: Path) -> Manifest:
    """The Manifest in a file written by `pack`.

    Raises Damage unless every byte is as written, StoreError for another format version.
    """
    with disk_errors(path, "read"):
        text = path.read_bytes()
    body = text[: -len(_tail(b""))]
    if text != body + _tail(body + b"\n}"):
        raise Damage(path, 0, "the text does not match its checksum (changed by hand, or damaged)")
    fields = json.loads(text)
    if fields.get("format_version") not in VERSIONS:
        raise StoreError(
            f"{path}: store format version {fields.get('format_version')}; this program reads version {VERSION}"
        )
    return _build(path, fields)


def _build(path: Path, fields: Mapping[str, Any]) -> Manifest:
    values = {"always": (), **{key: value for key, value in fields.items() if key != "checksum"}}
    odd = set(values) ^ {f.name for f in dataclasses.fields(Manifest)}
    if odd:
        raise StoreError(
            f"{path}: written by another version of this program (keys {', '.join(sorted(odd))}); collect again"
        )
    built: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Manifest(**built)
