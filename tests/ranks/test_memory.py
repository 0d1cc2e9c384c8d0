"""The predicted memory against what the trainer really holds: byte for byte where it is counted, not estimated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from jobs import Job, opened
from models import LLAMA, QWEN3, write_folder
from pool import fresh

from megatron_replay.config import Adapter, Layout, Optimizer, RunConfig, Train
from megatron_replay.device import CPU, NPU
from megatron_replay.models.spec import ModelSpec
from megatron_replay.parallel import activations, shims
from megatron_replay.parallel.losses import LOSSES
from megatron_replay.parallel.mcore.attention import pack
from megatron_replay.parallel.mcore.lora_layers import attach
from megatron_replay.parallel.memory import predict
from megatron_replay.parallel.trainer import make_trainer

TOKENS = 48
UNTIED = {**QWEN3, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    configs = {"qwen3": {**QWEN3, "tie_word_embeddings": True}, "untied": UNTIED, "llama": LLAMA}
    return {name: str(write_folder(root / name, config)) for name, config in configs.items()}


def kept(job: Job, counted: int | None) -> int:
    """On a rank: bytes of the distinct tensors that autograd keeps of one layer, its parameters aside.

    It is the first layer, or with `counted` the last one with so many rows that count.
    """
    with opened(job.folder, job.layout, job.dtype) as model:
        layer = model.module.decoder.layers[0 if counted is None else -1]
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        model.module.rotary_pos_emb.positions = torch.arange(TOKENS)[None]
        x = torch.randn(
            activations.tokens_here(job.layout, TOKENS), 1, model.spec.hidden_size, dtype=job.dtype, requires_grad=True
        )
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            table = pack(torch.tensor([[0, TOKENS, -1]]), torch.arange(counted or 0))
            layer(x, attention_mask=table, rotary_pos_emb=model.module.rotary_pos_emb())
        return sum(tensor.untyped_storage().nbytes() for pointer, tensor in seen.items() if pointer not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3", Layout()),
        ("llama", Layout()),
        ("qwen3", Layout(recompute="selective")),
        ("qwen3", Layout(tensor=2)),
        ("qwen3", Layout(tensor=4, sequence_parallel=True)),
    ],
    ids=["qwen3", "llama", "selective", "TP2", "TP4 with sequence parallelism"],
)
@pytest.mark.parametrize("counted", [None, 8], ids=["a layer", "the last one"])
def test_activations_are_what_autograd_keeps(
    folders: dict[str, str], name: str, layout: Layout, dtype: torch.dtype, counted: int | None
) -> None:
    spec = ModelSpec.from_hf(folders[name])
    found = fresh(layout.tensor, kept, Job(folder=folders[name], layout=layout, dtype=dtype), counted)
    wanted = activations.layer(spec, layout, TOKENS, dtype.itemsize, counted=counted).kept
    shims.import_megatron()
    from megatron.core.transformer.transformer_config import TransformerConfig

    # megatron's SwiGLU adds nothing to its linear half: that is one tensor less
    if not hasattr(TransformerConfig, "glu_linear_offset"):
        wanted -= (counted or TOKENS) * spec.ffn_size // layout.tensor * dtype.itemsize
    assert all(0 <= size - wanted <= 160 for size in found), (
        "a checkpointed attention keeps its table of segments and rows too"
    )


def held(job: Job, config: RunConfig) -> tuple[int, int, int, int]:
    """On a rank: its pipeline stage, and bytes of weights, gradient buffers, and optimizer state with main weights."""
    with opened(job.folder, job.layout, job.dtype) as model:
        if config.adapter.rank:
            attach(model, config.adapter, seed=config.seed)
        if config.train.freeze_share:
            model.freeze_half(config.train.freeze_share, config.seed)
        trainer = make_trainer(model, config.optimizer)
        trainer.inner.init_state()
        weights = sum(parameter.nbytes for parameter in model.module.parameters())
        gradients = sum(buffer.grad_data.nbytes for buffer in trainer.wrapped.buffers)
        state: Any = [tensor for each in trainer.inner.state.values() for tensor in each.values()]
        mains = (
            [p for group in trainer.inner.param_groups for p in group["params"]] if job.dtype == torch.bfloat16 else []
        )
        return model.world.pipeline_rank, weights, gradients, sum(tensor.nbytes for tensor in [*state, *mains])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "layout", "replicas", "changes"),
    [
        ("qwen3", Layout(), 1, {}),
        ("untied", Layout(zero1=False), 1, {"optimizer": Optimizer(name="muon")}),
        ("untied", Layout(), 1, {"optimizer": Optimizer(name="adamuon")}),
        ("qwen3", Layout(), 1, {"optimizer": Optimizer(name="moclip", options={"pull": 1.0})}),
        ("qwen3", Layout(zero1=False), 1, {"adapter": Adapter(rank=4)}),
        ("qwen3", Layout(zero1=False), 1, {"train": Train(freeze_share=0.5)}),
        ("llama", Layout(tensor=3), 1, {}),
        ("qwen3", Layout(pipeline=2), 1, {}),
        ("untied", Layout(pipeline=2, zero1=False), 1, {}),
        ("qwen3", Layout(), 2, {}),
        ("qwen3", Layout(zero1=False), 2, {}),
    ],
    ids=["plain", "muon", "adamuon", "pull", "adapter", "half", "TP3", "PP2 tied", "PP2 untied", "DP2 ZeRO-1", "DP2"],
)
def test_what_is_always_held(
    folders: dict[str, str], name: str, layout: Layout, replicas: int, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    config = dataclasses.replace(RunConfig(), layout=layout, **changes)
    job = Job(folder=folders[name], layout=layout, dtype=dtype, replicas=replicas)
    peaks = predict(ModelSpec.from_hf(folders[name]), config, ranks=job.ranks, dtype=dtype, device=CPU)
    found = fresh(job.ranks, held, job, config)
    assert {stage for stage, *_ in found} == {peak.stage for peak in peaks}
    for peak in peaks:
        ranks = [sizes for stage, *sizes in found if stage == peak.stage]
        assert {weights for weights, _, _ in ranks} == {peak.weights}
        assert all(0 <= gradients - peak.gradients <= 0.03 * peak.gradients for _, gradients, _ in ranks), (
            "buffers are padded"
        )
        assert sum(state for *_, state in ranks) / len(ranks) == pytest.approx(peak.optimizer, rel=1e-3)


def test_a_device_that_is_not_here_is_predicted_too() -> None:
    """`ranks` and `device` are numbers and names; nothing is started."""
    spec = ModelSpec.from_hf(QWEN3)
    config = RunConfig(layout=Layout(tensor=2, pipeline=2))
    peaks = predict(spec, config, ranks=8, dtype=torch.bfloat16, device=NPU)
    assert [peak.stage for peak in peaks] == [0, 1] and all(peak.base == 0 and peak.moment for peak in peaks)


def test_restricted_training_does_not_grow_with_the_logits() -> None:
    """Head and loss take the same at any vocabulary; the full loss does not."""
    small, large = (ModelSpec.from_hf({**UNTIED, "vocab_size": vocab}) for vocab in (49_152, 151_936))
    largest = activations.LargestMicroBatch(tokens=1024, positions=512, candidates=51_200, micro_batches=1)

    def head(loss: str, spec: ModelSpec) -> int:
        return LOSSES.get(loss).head_bytes(spec, largest, 2, rows=spec.padded_vocab(), trained=True, cpu=False)

    assert head("restricted", small) == head("restricted", large)
    full = [head("full", spec) - head("restricted", spec) for spec in (small, large)]
    assert full[1] > 2 * full[0]
