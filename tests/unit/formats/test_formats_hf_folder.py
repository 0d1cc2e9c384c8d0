from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from megatron_replay.errors import CheckpointError
from megatron_replay.formats.hf_folder import HFFolder, sha256_file
from megatron_replay.formats.hf_writer import HFWriter
from megatron_replay.models.spec import ModelSpec
from megatron_replay.models.weight_table import WeightTable
from megatron_replay.models.weights import merge, split


@pytest.fixture
def tensors(config):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in WeightTable(ModelSpec.from_hf(config())).hf_shapes.items()
    }


@pytest.fixture
def folder(tmp_path, config, tensors):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config()))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write(target, spec, tensors, **options):
    with HFWriter(target, spec, **options) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)


def copy(source, target, head_multiple=4, **options):
    """The whole way: read, merge, split, write, side files."""
    opened = HFFolder(source)
    opened.check()
    with HFWriter(target, opened.spec, dtype=opened.dtype("model.norm.weight"), **options) as out:
        for weight in WeightTable(opened.spec, head_multiple=head_multiple):
            whole = merge(weight, {name: opened.read(name) for name in weight.hf})
            for name, tensor in split(weight, whole).items():
                out.add(name, tensor)
        out.copy_side_files(source)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("shard_bytes", [5 << 30, 4000])
def test_transformers_loads_the_copy_unchanged(saved_model, tmp_path, family, tied, shard_bytes):
    model, source = saved_model(family, tied)
    copy(source, tmp_path / "copy", shard_bytes=shard_bytes)
    again, info = type(model).from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(info.values())
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    ids = torch.arange(12)[None] % 37
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again.eval()(ids).logits)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()


def test_reads_shards_that_transformers_wrote(saved_model, tmp_path):
    model, source = saved_model("Qwen3", False, max_shard_size="8KB")
    opened = HFFolder(source)
    opened.check()
    assert len(opened.files) > 1
    assert all(torch.equal(opened.read(name), tensor) for name, tensor in model.state_dict().items())
    copy(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()


def test_bytes_are_those_of_safetensors(folder, tensors, tmp_path):
    write(tmp_path / "out", HFFolder(folder).spec, dict(reversed(tensors.items())))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_shards_and_index(folder, tensors, tmp_path):
    write(tmp_path / "out", HFFolder(folder).spec, tensors, shard_bytes=2000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert sorted(part) == sorted(name for name, where in index["weight_map"].items() if where == file)
        assert sum(2 * tensor.numel() for tensor in part.values()) <= 2000
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in part.items())


def test_lazy_reading(folder, tensors):
    opened = HFFolder(folder)
    assert opened.names() == sorted(tensors)
    assert opened.shape("lm_head.weight") == (37, 24)
    assert opened.dtype("lm_head.weight") == torch.bfloat16
    assert torch.equal(opened.read("lm_head.weight"), tensors["lm_head.weight"])
    with pytest.raises(CheckpointError, match="'nope' is missing"):
        opened.read("nope")


def resave(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return HFFolder(folder)


def test_check_names_what_is_wrong(folder, tensors):
    HFFolder(folder).check()
    gate = "model.layers.1.mlp.gate_proj.weight"
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' \[20, 24\] is missing \(and 1 more\)"):
        resave(folder, {k: v for k, v in tensors.items() if k not in (gate, "model.norm.weight")}).check()
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' is \[24, 20\], expected \[20, 24\]"):
        resave(folder, {**tensors, gate: tensors[gate].T.contiguous()}).check()
    with pytest.raises(CheckpointError, match=r"'extra' \[2\] does not belong"):
        resave(folder, {**tensors, "extra": torch.zeros(2)}).check()
    with pytest.raises(CheckpointError, match=r"gate_proj.weight' is stored as I8"):
        resave(folder, {**tensors, gate: torch.zeros(20, 24, dtype=torch.int8)}).check()


def test_known_extras_are_ignored(folder, tensors, config):
    resave(folder, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}).check()
    (folder / "config.json").write_text(json.dumps(config(tie_word_embeddings=True)))
    HFFolder(folder).check()


def test_damaged_weights(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for broken in (data[:-1], data[:4], b"", b"\xff" * 100, data + b"more"):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated or corrupt"):
            HFFolder(folder)


def test_folders_without_safetensors(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights: neither"):
        HFFolder(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        HFFolder(folder)


def test_index_that_does_not_fit(folder, tensors):
    index = folder / "model.safetensors.index.json"
    for text in (
        "{",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
    ):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: "):
            HFFolder(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "ghost"], "model.safetensors")}))
    with pytest.raises(CheckpointError, match=r"'ghost' is not in model\.safetensors"):
        HFFolder(folder)
    index.write_text(json.dumps({"weight_map": {"ghost": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors, named by .* is missing \(1 of 1 files\)"):
        HFFolder(folder)


def test_fingerprint_is_of_names_and_contents(folder, tensors):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert sha256_file(folder / "model.safetensors", chunk=7) == digest
    first = HFFolder(folder).fingerprint()
    assert first == hashlib.sha256(f"model.safetensors {digest}\n".encode()).hexdigest()
    (folder / "README.md").write_text("not weights")
    assert HFFolder(folder).fingerprint() == first
    changed = {**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}
    assert resave(folder, changed).fingerprint() != first


def test_side_files(folder, tensors, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("hello")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "model.safetensors.index.json.bak").write_text("side")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "onnx").mkdir()
    with HFWriter(tmp_path / "out", HFFolder(folder).spec, dtype=torch.float32) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor.float())
        out.copy_side_files(folder)
    expected = [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json.bak",
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [*expected, "tokenizer.json"]
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
    assert after == {**before, "torch_dtype": "float32"}
    assert HFFolder(tmp_path / "out").spec.dtype == "float32"


def test_nothing_is_left_of_a_failed_write(folder, tensors, tmp_path):
    target = tmp_path / "here" / "out"
    spec = HFFolder(folder).spec
    with pytest.raises(CheckpointError, match=rf"{len(tensors)} of {len(tensors)} tensors were never written"):
        write(target, spec, {})
    with pytest.raises(KeyboardInterrupt), HFWriter(target, spec):
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []


def test_targets_and_tensors_that_do_not_fit(folder, tensors, tmp_path):
    spec = HFFolder(folder).spec
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        HFWriter(folder, spec)
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        HFWriter(folder / "config.json", spec)
    norm = "model.norm.weight"
    for name, tensor, said in (
        ("nope", tensors[norm], "no tensor 'nope'"),
        (norm, tensors[norm][:3], r"is \[3\] torch.bfloat16, expected \[24\]"),
        (norm, tensors[norm].float(), r"is \[24\] torch.float32, expected \[24\] torch.bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=said), HFWriter(tmp_path / "out", spec) as out:
            out.add(name, tensor)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", spec, tensors)
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_full_disk_is_said_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(CheckpointError, match=r"the disk has 0\.0 GB free"):
        HFWriter(tmp_path / "out", HFFolder(folder).spec)
