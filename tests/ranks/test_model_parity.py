"""Logits of megatron's model on every layout against transformers' own model of the same weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import opened
from models import LLAMA, QWEN3, tokens, with_transformers, write_folder
from pool import fresh
from torch import Tensor

from megatron_replay.config import Layout
from megatron_replay.errors import LayoutError
from megatron_replay.models.weights import restripe
from megatron_replay.parallel import shims
from megatron_replay.parallel.batch import flatten, row_length
from megatron_replay.parallel.mcore.model import uneven_stages
from megatron_replay.parallel.pipeline import forward

EXACT = 1e-4
LENGTHS = (13, 13, 7, 21)
"""Two equal neighbours, which attention computes as one batch, and two that are not."""
PP31 = {"pipeline": 2, "split": (3, 1)}
QWEN3_LAYOUTS: list[dict[str, Any]] = [
    {},
    {"stripe": True},
    {"tensor": 2},
    {"tensor": 2, "stripe": False},
    {"tensor": 2, "sequence_parallel": True},
    {"tensor": 4},
    {"pipeline": 2},
    PP31,
]
BOTH: dict[str, Any] = {"tensor": 2, "pipeline": 2, "sequence_parallel": True}
ROPE = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 3.0},
}


def logits(
    folder: str, layout: Layout, rows: list[list[np.ndarray]], dtype: torch.dtype = torch.float32
) -> list[np.ndarray] | None:
    """On a rank: its columns of the logits of all tokens but each sample's last, one tensor a row.

    None before the last stage.
    """
    with opened(folder, layout, dtype) as model:
        length = row_length([sum(map(len, row)) for row in rows], layout.tensor)
        batches = [
            flatten(row, [np.arange(len(ids) - 1) for ids in row], length, model.world.torch_device) for row in rows
        ]
        found: list[np.ndarray] = []
        forward(
            model,
            batches,
            lambda _, hidden, weight: hidden @ weight.t(),
            consume=lambda _, out: found.append(out.float().numpy()),
        )
        return found if model.world.last_stage else None


def sharded(
    folder: Path, layout: Layout, rows: list[list[np.ndarray]], vocab: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The logits [N, vocab] of each row, whole."""
    answers = fresh(layout.tensor * layout.pipeline, logits, str(folder), layout, rows, dtype)
    last = [answer for answer in answers if answer is not None]
    assert len(last) == layout.tensor
    whole = [torch.from_numpy(np.concatenate(columns, 1)) for columns in zip(*last, strict=True)]
    return [(restripe(columns.t(), striped=False).t() if layout.striped else columns)[:, :vocab] for columns in whole]


@torch.no_grad()
def reference(model: Any, row: list[np.ndarray]) -> Tensor:
    """transformers' logits of each sample, computed one sample at a time."""
    return torch.cat([model(torch.from_numpy(ids)[None]).logits[0, :-1] for ids in row])


def close(ours: Tensor, theirs: Tensor, tolerance: float = EXACT) -> None:
    assert theirs.abs().max() > 1, "logits near zero would agree by chance"
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def qwen3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, with_transformers(folder, {**QWEN3, "tie_word_embeddings": request.param})


@pytest.mark.parametrize("layout", [*QWEN3_LAYOUTS, BOTH], ids=str)
def test_qwen3_is_transformers_qwen3(qwen3: tuple[Path, Any], layout: dict[str, Any]) -> None:
    folder, model = qwen3
    row = tokens(LENGTHS, QWEN3["vocab_size"], "qwen3")
    for ours in sharded(folder, Layout(**layout), [row, row], QWEN3["vocab_size"]):
        close(ours, reference(model, row))


class Old:
    """The fields of a TransformerConfig that matter here, as in megatron-core 0.12."""

    __dataclass_fields__ = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")


@pytest.mark.parametrize(
    ("split", "first", "last"),
    [([3, 1], 3, None), ([2, 3, 1], 2, 1), ([1, 2, 2, 1], 1, 1), ([2, 1, 1], 2, 1), ([2, 2, 2, 1], 2, 1)],
)
def test_uneven_stages_where_megatron_knows_no_layout_of_them(split: list[int], first: int, last: int | None) -> None:
    expected = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
    assert uneven_stages(split, Old) == {key: layers for key, layers in expected.items() if layers is not None}


@pytest.mark.parametrize(
    ("split", "near"), [([3, 3, 2, 2], [3, 2, 2, 3]), ([1, 2, 3, 2, 4], [1, 2, 2, 2, 5]), ([1, 1, 9, 1], [1, 5, 5, 1])]
)
def test_a_split_megatron_cannot_make_is_refused_with_one_it_can(split: list[int], near: list[int]) -> None:
    shims.import_megatron()
    with pytest.raises(
        LayoutError, match=f"{re.escape(str(split))}: megatron-core .*use layout.split={re.escape(str(near))} or"
    ) as caught:
        uneven_stages(split, Old)
    assert shims.megatron_version() in str(caught.value)
    assert sum(near) == sum(split) and uneven_stages(near, Old), "what is offered is taken"


def build_uneven(folder: str, layout: Layout) -> str:
    """On a rank: the name of what a model with this split ends in."""
    try:
        with opened(folder, layout) as model:
            return str(len(model.module.decoder.layers))
    except LayoutError as err:
        return str(err)


def test_a_split_of_four_unlike_stages_is_built_or_refused_on_all_ranks(tmp_path: Path) -> None:
    write_folder(tmp_path, {**QWEN3, "num_hidden_layers": 7})
    shims.import_megatron()
    answers = fresh(4, build_uneven, str(tmp_path), Layout(pipeline=4, split=(2, 3, 1, 1)))
    if shims.within(shims.megatron_version(), ">=0.12,<0.13"):
        assert len(set(answers)) == 1 and "use layout.split=" in answers[0]
    else:
        assert answers == ["2", "3", "1", "1"]


@pytest.mark.parametrize(("tensor", "head_multiple"), [(1, 1), (3, 1), (2, 4), (4, 4)])
def test_llama_with_nine_heads_is_transformers_llama(tmp_path: Path, tensor: int, head_multiple: int) -> None:
    model = with_transformers(tmp_path, LLAMA)
    row = tokens(LENGTHS, LLAMA["vocab_size"], "llama")
    (ours,) = sharded(tmp_path, Layout(tensor=tensor, head_multiple=head_multiple), [row], LLAMA["vocab_size"])
    close(ours, reference(model, row))


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotary_angles_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    plain = with_transformers(tmp_path / "plain", LLAMA)
    model = with_transformers(tmp_path / "scaled", {**LLAMA, "rope_scaling": {"rope_type": kind, **ROPE[kind]}})
    row = tokens((90, 30), LLAMA["vocab_size"], "rope")
    (ours,) = sharded(tmp_path / "scaled", Layout(), [row], LLAMA["vocab_size"])
    close(ours, reference(model, row))
    assert (ours - reference(plain, row)).abs().max() > 100 * EXACT, "the scaling must show in the logits"


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}], ids=str)
def test_a_sample_does_not_see_its_neighbours(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Other tokens on both sides of a sample, the same lengths: not a bit of its logits changes."""
    folder = tmp_path
    write_folder(folder, {**QWEN3, "num_hidden_layers": 2})
    row = tokens(LENGTHS, QWEN3["vocab_size"], "row")
    other = tokens(LENGTHS, QWEN3["vocab_size"], "other")
    mixed = [other[0], row[1], other[2], row[3]]
    ours, theirs = sharded(folder, Layout(**layout), [row, mixed], QWEN3["vocab_size"])
    for i, (a, b) in enumerate(zip(*(x.split([n - 1 for n in LENGTHS]) for x in (ours, theirs)), strict=True)):
        assert torch.equal(a, b) == (i in (1, 3)), f"sample {i}"


@pytest.mark.parametrize("layout", [{}, BOTH], ids=str)
def test_bf16_is_close(qwen3: tuple[Path, Any], layout: dict[str, Any]) -> None:
    folder, model = qwen3
    row = tokens(LENGTHS, QWEN3["vocab_size"], "qwen3")
    (ours,) = sharded(folder, Layout(**layout), [row], QWEN3["vocab_size"], torch.bfloat16)
    error = (ours - reference(model, row)).square().mean().sqrt() / reference(model, row).square().mean().sqrt()
    assert 1e-4 < error < 0.03
