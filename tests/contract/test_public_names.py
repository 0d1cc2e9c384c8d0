"""The names and signatures users rely on."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

NAMES = {
    "megatron_replay.ops": [
        "VocabShard",
        "CandidateSets",
        "dynamic_topk",
        "select_positions",
        "restricted_linear_cross_entropy",
        "restricted_linear_terms",
        "restricted_cross_entropy",
    ],
    "megatron_replay.optim": [
        "AdamW",
        "AdamAtan2",
        "MoClip",
        "MoFO",
        "TAM",
        "Muon",
        "AdaMuon",
        "MuonClip",
        "build_optimizer",
    ],
    "megatron_replay.store": ["CandidateStore"],
    "megatron_replay.config": ["RunConfig"],
    "megatron_replay.errors": [
        "ReplayError",
        "ConfigError",
        "DataError",
        "StoreError",
        "CheckpointError",
        "LayoutError",
        "DeviceError",
    ],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in NAMES.items() for name in names])
def test_a_public_name_is_where_it_is_documented_and_at_the_top(module: str, name: str) -> None:
    home = importlib.import_module(module)
    assert name in getattr(home, "__all__", [name])
    top = importlib.import_module("megatron_replay")
    assert getattr(top, name) is getattr(home, name)
    assert name in top.__all__ and name in dir(top)


def test_the_package_says_its_version_and_denies_a_wrong_name() -> None:
    top = importlib.import_module("megatron_replay")
    assert top.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no attribute 'MoClap'"):
        _ = top.MoClap


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, megatron_replay; print([m for m in ('torch', 'numpy', 'megatron.core', 'yaml') if m in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


SIGNATURES = {
    "ops:dynamic_topk": {"logits": ..., "gold": ..., "tau": 0.95, "k_max": 200, "vocab_size": None, "shard": None},
    "ops:restricted_linear_cross_entropy": {"hidden": ..., "weight": ..., "sets": ..., "shard": None},
    "ops:restricted_cross_entropy": {"logits": ..., "sets": ..., "shard": None},
    "ops:select_positions": {
        "confidence": ...,
        "loss_mask": ...,
        "strategy": ...,
        "fraction": ...,
        "buckets": ...,
        "generator": ...,
    },
    "ops:VocabShard": {"start": ..., "stop": ..., "group": None},
    "optim:MoClip": {
        "params": ...,
        "lr": ...,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "max_angle": 45.0,
        "scope": "global",
        "obtuse": "signed",
        "v_source": "raw",
        "shards": ...,
    },
}
"""Parameter -> documented default; ... where none is promised."""


@pytest.mark.parametrize("where", SIGNATURES)
def test_a_signature_takes_what_is_documented(where: str) -> None:
    module, name = where.split(":")
    parameters = inspect.signature(getattr(importlib.import_module(f"megatron_replay.{module}"), name)).parameters
    promised = SIGNATURES[where]
    assert [p for p in parameters if p in promised] == list(promised)
    for parameter, default in promised.items():
        if default is not ...:
            assert parameters[parameter].default == default, parameter
    extra = [
        p
        for p in parameters.values()
        if p.name not in promised and p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    assert not extra, "a call as documented would not pass"


def test_candidate_sets_have_the_documented_fields() -> None:
    ops = importlib.import_module("megatron_replay.ops")
    assert [f.name for f in dataclasses.fields(ops.CandidateSets)] == [
        "offsets",
        "ids",
        "gold_slot",
        "logits",
        "lse",
        "outside_mass",
    ]


def test_a_candidate_store_offers_the_documented_methods() -> None:
    store = importlib.import_module("megatron_replay.store").CandidateStore
    for name in ("open", "__len__", "__iter__", "__getitem__", "verify"):
        assert callable(getattr(store, name)), name
