"""Checkpoints between megatron's own save and load and our reader and writer, on every layout; bit for bit."""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import queue
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pool import fresh
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_replay.config import Layout
from megatron_replay.device import CPU
from megatron_replay.errors import CheckpointError
from megatron_replay.formats import torch_dist
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import Weight, shard
from megatron_replay.parallel import shims
from megatron_replay.parallel.mcore.model import build
from megatron_replay.parallel.ranks import world

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 200,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
LLAMA = {**CONFIG, "architectures": ["LlamaForCausalLM"], "num_attention_heads": 9, "num_key_value_heads": 3}


def spec_of(*, tied: bool, config: dict[str, Any] = CONFIG) -> ModelSpec:
    return ModelSpec.from_hf({**config, "tie_word_embeddings": tied})


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that depends on its name alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode()[-7:], "little") + sum(name.encode()))
    return torch.randn(shape, generator=generator)


def megatron_saves(path: str, spec: ModelSpec, layout: Layout) -> int:
    """On a rank: fill the model by name, and save it as training does, with an optimizer's state beside it."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as megatron_writer
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    multiprocessing.current_process()._config["daemon"] = False  # megatron's writer forks helpers
    results: queue.Queue[Any] = queue.Queue()
    megatron_writer._get_write_results_queue = lambda: results  # its manager process would outlive this rank
    with world.running(layout, CPU) as ours:
        model = build(spec, layout, ours, torch.float32, seq_length=16)
        with torch.no_grad():
            for _, weight, parameter in model.parameters():
                parameter.copy_(
                    shard(value(weight.name, weight.shape), weight.axis, ours.tensor_rank, ours.tensor_size)
                )
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(use_distributed_optimizer=False), model.module
        )
        optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.1, weight_decay=0.0), [wrapped])
        for parameter in model.module.parameters():
            parameter.main_grad.fill_(1.0)
        state: dict[str, Any] = {"model": model.module.sharded_state_dict(), "iteration": 7}
        state["optimizer"] = optimizer.sharded_state_dict({"model": state["model"]}, is_loading=False)
        if ours.is_main:
            Path(path).mkdir(parents=True)
        ours.barrier()
        dist_checkpointing.save(state, path)
        return ours.rank


def megatron_loads(path: str, spec: ModelSpec, layout: Layout) -> list[str]:
    """On a rank: the names of the parameters that megatron's load left other than `shard` of the whole ones."""
    from megatron.core import dist_checkpointing

    with world.running(layout, CPU) as ours:
        model = build(spec, layout, ours, torch.float32, seq_length=16)
        for parameter in model.module.parameters():
            parameter.data.fill_(float("nan"))
        state = dist_checkpointing.load({"model": model.module.sharded_state_dict()}, path)
        model.module.load_state_dict(state["model"])
        table = {weight.name for weight in WeightTable.of(spec, layout)}
        wrong = []
        for name, weight, parameter in model.parameters():
            assert weight.name in table
            expected = shard(value(weight.name, weight.shape), weight.axis, ours.tensor_rank, ours.tensor_size)
            if not torch.equal(parameter.detach(), expected):
                wrong.append(name)
        return wrong


def write(path: Path, spec: ModelSpec, *, head_multiple: int = 1) -> Path:
    table = WeightTable(spec, head_multiple=head_multiple)
    torch_dist.write_model(path, table, lambda weight: value(weight.name, weight.shape), dtype=torch.float32)
    return path


@pytest.mark.parametrize(
    ("tied", "layout"),
    [
        (False, Layout(tensor=1, pipeline=1)),
        (False, Layout(tensor=2, pipeline=2)),
        (True, Layout(tensor=2, pipeline=2)),
        (True, Layout(tensor=1, pipeline=2, split=(3, 1))),
    ],
    ids=str,
)
def test_the_reader_reads_what_megatron_saves(tmp_path: Path, tied: bool, layout: Layout) -> None:
    spec = spec_of(tied=tied)
    fresh(layout.tensor * layout.pipeline, megatron_saves, str(tmp_path / "iter_0000007"), spec, layout)
    reader = torch_dist.Reader(tmp_path / "iter_0000007")
    reader.check(WeightTable(spec))
    for weight in WeightTable(spec):
        assert torch.equal(reader.read(weight), value(weight.name, weight.shape)), weight.name
    model = {key for key in reader.keys() if not key.startswith("optimizer")}  # noqa: SIM118 - not a mapping
    assert ("output_layer.weight" in model) is not tied
    # the writer's keys, shapes and objects are those of the real thing, neither more nor less
    write(tmp_path / "iter_0000000", spec)
    theirs, ours = (
        reader._metadata.state_dict_metadata,
        torch_dist.Reader(tmp_path / "iter_0000000")._metadata.state_dict_metadata,
    )
    assert shapes(ours) == {key: shape for key, shape in shapes(theirs).items() if not key.startswith("optimizer")}


def shapes(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else "object"
        for key, entry in entries.items()
    }


@pytest.mark.parametrize(
    ("tied", "layout"),
    [
        (True, Layout()),
        (False, Layout(tensor=2)),
        (True, Layout(pipeline=2)),
        (False, Layout(tensor=2, pipeline=2)),
        (True, Layout(tensor=2, pipeline=2)),
        (False, Layout(tensor=4)),
        (False, Layout(pipeline=3, split=(2, 1, 1))),
    ],
    ids=str,
)
def test_megatron_loads_what_the_writer_writes(tmp_path: Path, tied: bool, layout: Layout) -> None:
    spec = spec_of(tied=tied)
    path = write(tmp_path / "iter_0000000", spec)
    assert fresh(layout.tensor * layout.pipeline, megatron_loads, str(path), spec, layout) == [[]] * (
        layout.tensor * layout.pipeline
    )


def test_padded_heads_go_to_four_ranks(tmp_path: Path) -> None:
    spec, layout = spec_of(tied=True, config=LLAMA), Layout(tensor=4, head_multiple=4)
    path = write(tmp_path / "iter_0000000", spec, head_multiple=4)
    assert fresh(4, megatron_loads, str(path), spec, layout) == [[]] * 4


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    reader = torch_dist.Reader(write(tmp_path / "iter_0000000", spec_of(tied=True)))
    with pytest.raises(CheckpointError, match=r"'output_layer\.weight' \[256, 32\] is missing"):
        reader.check(WeightTable(spec_of(tied=False)))
    deeper = WeightTable(spec_of(tied=True, config={**CONFIG, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match=r"layer_norm_weight' is \[4, 32\], expected \[5, 32\]"):
        reader.check(deeper)
    with pytest.raises(CheckpointError, match=r"layer_norm_weight' is \[4, 32\], expected \[5, 32\]"):
        reader.read(deeper.base[1])


def test_equal_models_are_equal_files(tmp_path: Path) -> None:
    spec = spec_of(tied=True)

    def part_of_more(weight: Weight) -> torch.Tensor:
        whole = value(weight.name, weight.shape)
        return torch.cat([whole.flatten(), torch.zeros(100)])[: whole.numel()].view(weight.shape)

    torch_dist.write_model(tmp_path / "b", WeightTable(spec), part_of_more, dtype=torch.float32)
    one, two = write(tmp_path / "a", spec), tmp_path / "b"
    for name in sorted(file.name for file in one.iterdir()):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_resolve_names_what_is_missing(tmp_path: Path) -> None:
    spec = spec_of(tied=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        torch_dist.resolve(tmp_path / "nowhere")
    assert not torch_dist.is_checkpoint(tmp_path)
    write(tmp_path / "iter_0000005", spec)
    assert torch_dist.is_checkpoint(tmp_path) and torch_dist.is_checkpoint(tmp_path / "iter_0000005")
    with pytest.raises(CheckpointError, match="no save was finished"):
        torch_dist.resolve(tmp_path)
    (tmp_path / torch_dist.LATEST).write_text("5\n")
    assert torch_dist.resolve(tmp_path) == torch_dist.resolve(tmp_path / "iter_0000005") == tmp_path / "iter_0000005"
    (tmp_path / torch_dist.LATEST).write_text("release")
    with pytest.raises(CheckpointError, match="expected the number of an iteration, got 'release'"):
        torch_dist.resolve(tmp_path)
    (tmp_path / "iter_0000005" / "metadata.json").unlink()
    assert torch_dist.is_checkpoint(tmp_path / "iter_0000005")
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing"):
        torch_dist.resolve(tmp_path / "iter_0000005")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "iter_0000000", spec_of(tied=True))


@pytest.fixture
def broken(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def read_all(path: Path) -> None:
    reader = torch_dist.Reader(path)
    for weight in WeightTable(spec_of(tied=True)):
        reader.read(weight)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_all(path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_damage_is_told_with_file_and_tensor(broken: Path) -> None:
    read_all(broken)
    file = broken / "__0_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(broken, "__0_0.distcp", "byte")
    flipped = bytearray(whole)
    flipped[2000] ^= 1  # a value of the embedding: only its checksum can tell
    file.write_bytes(flipped)
    refused(broken, "__0_0.distcp", "'embedding.word_embeddings.weight'", "at byte 0", "checksum")
    file.unlink()
    refused(broken, "__0_0.distcp", "cannot be read")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json"])
def test_truncated_description_is_told(broken: Path, name: str) -> None:
    content = (broken / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (broken / name).write_bytes(content[:length])
        refused(broken, name, "damaged")


def test_metadata_of_megatron_0_15_is_read(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is a class of megatron's own, with a field more."""
    shims.import_megatron()
    module = importlib.import_module("megatron.core.dist_checkpointing.strategies.torch")
    theirs = type("MCoreMetadata", (Metadata,), {"__module__": module.__name__})
    monkeypatch.setattr(module, "MCoreMetadata", theirs, raising=False)
    made = theirs(**vars(torch_dist.read_metadata(broken)))
    made.mcore_data = {}
    (broken / ".metadata").write_bytes(pickle.dumps(made))
    read_all(broken)


class Touches:
    """Pickled, this creates a file when somebody loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_metadata_that_would_run_code_is_refused(broken: Path, tmp_path: Path) -> None:
    (broken / ".metadata").write_bytes(pickle.dumps(Touches(tmp_path / "ran")))
    refused(broken, ".metadata", "would run code")
    assert not (tmp_path / "ran").exists()
    pickle.loads((broken / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists(), "the test's own attack must work"


@pytest.mark.parametrize(
    ("module", "name"), [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch", "Size.__new__")]
)
def test_names_outside_the_list_are_refused(broken: Path, module: str, name: str) -> None:
    (broken / ".metadata").write_bytes(
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93."
    )
    refused(broken, f"{module}.{name}", "would run code")


def test_common_values_that_would_run_code_are_refused(broken: Path, tmp_path: Path) -> None:
    torch.save({"iteration": Touches(tmp_path / "ran")}, broken / "common.pt")
    refused(broken, "common.pt", "would run code")
    assert not (tmp_path / "ran").exists()


def test_an_object_among_the_tensors_that_would_run_code_is_refused(broken: Path, tmp_path: Path) -> None:
    found = torch_dist.read_metadata(broken)
    index = next(index for index in found.storage_data if "_extra_state" in index.fqn)
    with (broken / "__0_1.distcp").open("wb") as out:
        torch.save([Touches(tmp_path / "ran")], out)
        length = out.tell()
    info = found.storage_data[index]
    info.relative_path, info.offset, info.length = "__0_1.distcp", 0, length
    (broken / ".metadata").write_bytes(pickle.dumps(found))
    refused(broken, "__0_1.distcp", index.fqn, "would run code")
    assert not (tmp_path / "ran").exists()


def test_files_outside_the_folder_are_refused(broken: Path) -> None:
    found = torch_dist.read_metadata(broken)
    for info in found.storage_data.values():
        info.relative_path = "../__0_0.distcp"
    (broken / ".metadata").write_bytes(pickle.dumps(found))
    refused(broken, "../__0_0.distcp", "not in its folder")
