"""One table of operators: torch, the extensions and plain torch know those and no others."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from megatron_replay.kernels import library, torch_twins
from megatron_replay.kernels.schemas import OPERATORS

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_knows_the_schema_of_the_table(name: str) -> None:
    wanted = torch._C.parse_schema(f"{library.NAMESPACE}::{name}{OPERATORS[name].schema}")
    assert str(getattr(torch.ops.megatron_replay, name).default._schema) == str(wanted)


@pytest.mark.parametrize("source", ["register.cpp", "ascend/torch_binding.cpp"])
def test_an_extension_implements_every_operator_and_defines_none(source: str) -> None:
    text = (CSRC / source).read_text(encoding="utf-8")
    assert sorted(re.findall(r'library\.impl\(\s*"(\w+)"', text)) == sorted(OPERATORS)
    assert not re.search(r"\.def\(|TORCH_LIBRARY(_FRAGMENT)?\(", text)


def test_plain_torch_has_its_operators_under_their_names() -> None:
    twins = {name: operator.twin for name, operator in OPERATORS.items() if operator.twin}
    assert list(twins) == [field.name for field in fields(library.Kernels)]
    assert all(getattr(torch_twins, name) is twin for name, twin in twins.items())


def test_an_extension_older_than_an_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    has_kernel = library._has_kernel
    monkeypatch.setattr(library, "_has_kernel", lambda name, key: name != "adam_update" and has_kernel(name, key))
    assert library.live()["adam_update"] == "reference"
    if library.EXTENSION == "loaded":
        assert library._usable("loaded") == "cannot be used: built before adam_update was there; build it again"
    assert library._usable("not built") == "not built"
