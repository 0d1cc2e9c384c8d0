"""`convert --verify`: equal models pass, each kind of difference is found; and what training saves on four ranks
becomes a folder again."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import fresh
from safetensors.torch import load_file, save_file

from megatron_replay.config import Layout, Optimizer, RunConfig, load
from megatron_replay.device import CPU
from megatron_replay.errors import CheckpointError
from megatron_replay.formats.hf_folder import HFFolder
from megatron_replay.formats.torch_dist import Reader
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.parallel.checkpoints import training as checkpoint
from megatron_replay.parallel.mcore.model import build, load_hf
from megatron_replay.parallel.ranks import world
from megatron_replay.parallel.trainer import make_trainer
from megatron_replay.runtime.conversion_check import Pair, compare_logits, compare_tensors
from megatron_replay.stages.convert import run

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 40,
    "vocab_size": 150,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "hf"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(3)
    tensors = {
        name: torch.randn(shape) * 0.2 for name, shape in WeightTable(ModelSpec.from_hf(CONFIG)).hf_shapes.items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def converted(source: str, target: str, options: list[str]) -> str:
    """On a rank: what `convert --verify` says last."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(load(RunConfig, None, options), source, target, verify=True)
    return said.getvalue().splitlines()[-1]


@pytest.mark.parametrize("options", [[], ["layout.head_multiple=4"], ["precision=bf16"]], ids=str)
def test_both_ways_verify(folder: Path, tmp_path: Path, options: list[str]) -> None:
    there = fresh(1, converted, str(folder), str(tmp_path / "ckpt"), options)[0]
    assert there.startswith("verified: 20 tensors equal by sha256, logits of 62 positions differ by at most ")
    if "layout.head_multiple=4" not in options:
        assert there.endswith("at most 0")
    back = fresh(1, converted, str(tmp_path / "ckpt"), str(tmp_path / "back"), ["precision=fp32"])[0]
    assert back.startswith("verified: 20 tensors")


def logits_of(pair: Pair) -> tuple[float, int]:
    return compare_logits(pair)


def test_differences_are_found(folder: Path, tmp_path: Path) -> None:
    run(RunConfig(), str(folder), str(tmp_path / "ckpt"))
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    pair = Pair(WeightTable(ModelSpec.from_hf(CONFIG)), HFFolder(other), Reader(tmp_path / "ckpt"), torch.float32)
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.mlp\.down_proj\.weight' differs: sha256"):
        compare_tensors(pair, lambda _: None)
    with pytest.raises(AssertionError, match=r"CheckpointError: logits of .* differ by"):
        fresh(1, logits_of, pair)


def saves(folder: str, root: str, layout: Layout) -> None:
    """On a rank: save the folder's model as `train` does."""
    multiprocessing.current_process()._config["daemon"] = False  # megatron's writer forks helpers
    with world.running(layout, CPU) as ours:
        source = HFFolder(folder)
        model = build(source.spec, layout, ours, torch.float32, seq_length=16)
        load_hf(model, source)
        trainer = make_trainer(model, Optimizer())
        if ours.is_main:
            checkpoint.write_side_files(
                Path(root), source.path, {"head_multiple": layout.head_multiple, "dtype": "float32"}
            )
        checkpoint.save(Path(root), 12, trainer, {"iteration": 12})


def test_a_training_checkpoint_of_four_ranks_becomes_the_folder_again(folder: Path, tmp_path: Path) -> None:
    fresh(4, saves, str(folder), str(tmp_path / "run"), Layout(tensor=2, pipeline=2, head_multiple=2, zero1=True))
    assert any(key.startswith("optimizer") for key in Reader(tmp_path / "run").keys())  # noqa: SIM118 - not a mapping
    run(RunConfig(), str(tmp_path / "run"), str(tmp_path / "back"))
    expected, found = load_file(folder / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
