"""The README and the pages beside it say nothing that does not run: every command and every code block, as written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(page: str) -> list[str]:
    lines = [
        line.split("  #")[0].split(" # ")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()
    ]
    return [line for line in lines if line]


MAKE = [line for line in commands("README.md") if line.startswith("make ")]
PAGES = ["docs/optimizers.md", "docs/adapters.md", "docs/profiling.md"]
"""Pages whose commands run after the README's, in its folder."""
OURS = [line for page in ("README.md", *PAGES) for line in commands(page) if not line.startswith("make ")]


@pytest.mark.parametrize("page", ["README.md", "docs/method.md", *PAGES])
def test_python_blocks_run(page: str) -> None:
    found = blocks(page, "python")
    assert found
    for block in found:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT, capture_output=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README supposes: the examples, a model called Qwen3-4B (a tiny one), and data."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    model = folder / "models" / "Qwen3-4B"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=4096,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(model)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    data = folder / "data"
    data.mkdir()
    for name, count in (("train", 40), ("test", 6)):
        lines = [{"prompt": f"Question {i}: what is {i} + 1?\n", "completion": f"{i + 1}"} for i in range(count)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (data / "general.txt").write_text("The tide comes in twice a day. " * 30)
    return folder


def test_every_command_is_of_a_kind_that_is_run_here() -> None:
    # run by .ci/run and tests/unit/stages/test_demo*.py
    assert [line.split()[1] for line in MAKE] == ["demo-tiny", "test", "venv"]
    assert len(OURS) >= 6


@pytest.mark.parametrize("line", MAKE)
def test_make_targets_exist(line: str) -> None:
    subprocess.run(["make", "-n", *line.split()[1:]], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("line", OURS)
def test_commands_run_as_written(line: str, project: Path) -> None:
    """In the order of the page: later commands use what earlier ones made."""
    search = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        shlex.split(line), cwd=project, env=os.environ | search, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
