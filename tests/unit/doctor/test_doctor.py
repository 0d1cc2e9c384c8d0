"""`doctor`: what it finds here, what it says where something is missing, and the shape of its JSON."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_replay import cli
from megatron_replay.config import RunConfig, load
from megatron_replay.device import CPU, CUDA
from megatron_replay.doctor import machine
from megatron_replay.parallel import shims
from megatron_replay.parallel.ranks import probe
from megatron_replay.stages import doctor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 150,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
WORKING = {
    "ok": True,
    "ranks": 2,
    "device": "cpu",
    "backend": "gloo",
    "start_seconds": 0.1,
    "seconds": 0.001,
    "error": "",
}
Versions = Callable[..., None]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The trial of two ranks answers this at once."""
    answer = dict(WORKING)
    monkeypatch.setattr(machine, "try_all_reduce", lambda device: answer)
    return answer


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Versions:
    """`installed(torch_npu="2.7", numpy=None)`: what the packages' metadata say; an exception is raised."""
    real = importlib.metadata.version

    def set_to(**versions: Any) -> None:
        told = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> Any:
            found = told[name] if name in told else real(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)

    return set_to


def report(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> dict[str, Any]:
    """The output of `doctor --json`, which is one line."""
    assert cli.main(["doctor", "--json", *argv]) == code
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and "Traceback" not in err
    found = json.loads(out)
    assert isinstance(found, dict) and found["ok"] is (code == 0)
    return found


def test_here_it_works_two_ranks_included(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "all_reduce.ok" in out and "kernels.cpu.topk_rows" in out
    assert "shims: current_device, factories" in out and "environment: OMP_NUM_THREADS" in out
    assert re.search(r"the main job can run on: cpu \(1 x \d+\.\d GiB free\)\n$", out)


def test_the_trial_of_two_ranks_measures() -> None:
    found = probe.try_all_reduce(CPU)
    assert {**found, "start_seconds": 0, "seconds": 0} == {**WORKING, "start_seconds": 0, "seconds": 0}
    assert 0 < found["seconds"] < found["start_seconds"] < 60


@pytest.mark.parametrize(
    ("fault", "says"),
    [(RuntimeError("no route\nto host"), "RuntimeError: no route"), (SystemExit(9), "0 of 2 ranks answered within")],
    ids=["a rank that fails", "a rank that dies"],
)
def test_a_failing_rank_is_the_finding(
    fault: BaseException, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(probe.world, "start", broken)  # the ranks are forked and inherit it
    found = report(capsys, "device=cpu", code=1)
    assert not found["all_reduce"]["ok"] and says in found["all_reduce"]["error"]
    assert found["verdict"].startswith("the main job cannot run: 2 ranks over gloo cannot add up a tensor: ")


def test_a_wrong_sum_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.dist, "all_reduce", lambda *_, **__: None)
    assert probe.try_all_reduce(CPU)["error"] in [
        f"RuntimeError: the sum over 2 ranks is {rank}.0, expected 3.0" for rank in (1, 2)
    ]


def test_the_json_has_these_keys(
    two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str], installed: Versions
) -> None:
    found = report(capsys, "device=cpu")
    keys = ["ok", "verdict", "problems", "notes", "versions", *doctor.PARTS, "disk"]
    assert list(found) == keys
    assert list(found["versions"]) == ["megatron-replay", "python", *doctor.REQUIRED, *doctor.OPTIONAL]
    assert set(found["devices"]["cpu"]) == {"model", "count", "backend", "bf16", "free_bytes", "total_bytes"}
    assert 0 < found["devices"]["cpu"]["free_bytes"] <= found["devices"]["cpu"]["total_bytes"]
    assert set(found["kernels"]) == {"extension", "triton", *found["devices"]}
    assert set(found["kernels"]["cpu"].values()) <= {"compiled", "reference"}
    assert set(found["processor"]) == {"cores", "threads", "variables"}
    assert set(found["megatron"]) == {"adapter", "adapters_not_used", "shims", "norm", "attention", "optimizer"}
    assert set(found["environment"][-1]) == {"state", "value", "wanted", "name", "why"}
    assert found["environment"][-1]["name"] == "OMP_NUM_THREADS"
    here = shims.table(CPU, found["versions"]["megatron-core"])
    assert here and [shim["name"] for shim in found["megatron"]["shims"]] == [shim.name for shim in here]
    assert set(found["all_reduce"]) == set(WORKING) and set(found["disk"]) == {"path", "free_bytes", "total_bytes"}
    assert found["model"] is None and found["operators"] is None and found["problems"] == []
    installed(torch=None)
    assert list(report(capsys, code=1)) == keys


def test_the_versions_are_those_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    tree = tomllib.loads((Path(doctor.__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {re.split(r"[><=]", line)[0]: line for line in tree["dependencies"]}
    for name, (low, high) in doctor.REQUIRED.items():
        assert doctor._range(name, low, high) == wanted[name]
    assert doctor._range("", *doctor.PYTHON) == tree["requires-python"]
    supported = doctor._range("", *doctor.REQUIRED["megatron-core"])
    assert supported in {shim.versions for shim in shims.catalog(CPU)}
    assert {shim.versions.split(",")[0] for shim in shims.catalog(CPU)} == {supported.split(",")[0]}


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (None, "megatron-core is not installed; pip install 'megatron-core>=0.12,<0.17'"),
        ("0.17.0", "megatron-core 0.17.0 is not supported; pip install 'megatron-core>=0.12,<0.17'"),
        ("0.11.3", "megatron-core 0.11.3 is not supported; pip install 'megatron-core>=0.12,<0.17'"),
        (
            ValueError("torn"),
            "megatron-core metadata cannot be read (ValueError) is not supported; pip install "
            "'megatron-core>=0.12,<0.17'",
        ),
    ],
    ids=str,
)
def test_a_package_that_is_needed(
    version: Any, problem: str, installed: Versions, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(megatron_core=version)
    found = report(capsys, code=1)
    assert found["problems"] == [problem] and found["verdict"] == f"the main job cannot run: {problem}"
    assert found["devices"] is None  # nothing that needs it was imported
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == found["verdict"]


@pytest.mark.parametrize("version", ["0.12.0", "0.16.1", "0.16.0rc0", "0.15"])
def test_versions_within_the_range(
    version: str, installed: Versions, two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    installed(megatron_core=version)
    assert report(capsys, "device=cpu")["versions"]["megatron-core"] == version


def test_several_problems_are_counted(installed: Versions, capsys: pytest.CaptureFixture[str]) -> None:
    installed(torch="2.5.1", numpy=None)
    found = report(capsys, code=1)
    assert len(found["problems"]) == 2 and found["verdict"].endswith("pip install 'torch>=2.6' (and 1 more)")


def test_a_broken_optional_package_is_only_reported(
    installed: Versions, two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    installed(apex=OSError("unreadable"), mindspeed="0.12.1", transformer_engine="2.1")
    found = report(capsys, "device=cpu")
    assert found["versions"]["apex"] == "metadata cannot be read (OSError)"
    assert "mindspeed 0.12.1 is installed and not used" in found["notes"]
    assert found["megatron"]["optimizer"].endswith("for the Adam of transformer-engine")


def test_torch_npu_without_its_libraries(
    installed: Versions, two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    installed(torch_npu="2.7.1")
    notes = report(capsys, "device=cpu")["notes"]
    assert "torch-npu 2.7.1 is installed but finds no device (CANN missing, or no driver)" in notes


def test_a_package_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "megatron_replay.doctor.machine":
            raise OSError("libtorch_cpu.so: cannot open\nshared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    found = report(capsys, code=1)
    assert found["problems"] == [
        "cannot be imported: OSError: libtorch_cpu.so: cannot open shared object file; install the package it names "
        "again"
    ]


def test_one_part_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(mode: str) -> None:
        raise AttributeError("no such operator")

    monkeypatch.setattr(machine, "kernels", broken)
    found = report(capsys, "device=cpu", code=1)
    assert found["problems"] == ["kernels: AttributeError: no such operator"] and found["kernels"] is None
    assert found["devices"] and found["megatron"] and found["processor"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_absent(two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "device=cuda", code=1)
    assert found["problems"] == ["device=cuda is not available here; this machine has: cpu"]
    assert found["devices"]["cpu"]["count"] == 1


def test_one_accelerator_tries_two_ranks_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(probe, "launch", lambda *args: 1)
    assert probe.try_all_reduce(CUDA)["backend"] == "gloo"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert probe.try_all_reduce(CUDA)["device"] == "cuda"


def test_the_precision_of_the_configuration(
    two_ranks: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(capsys, "device=cpu", "precision=fp64")["ok"]
    monkeypatch.setattr("megatron_replay.device.choose", lambda name="auto": CUDA)
    found = report(capsys, "precision=fp64", code=1)
    assert any("precision=fp64 is for checking layouts" in problem for problem in found["problems"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    from megatron_replay.models.spec import ModelSpec
    from megatron_replay.models.weight_table import WeightTable

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(
        {name: torch.zeros(shape) for name, shape in WeightTable(ModelSpec.from_hf(CONFIG)).hf_shapes.items()},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def test_a_model_in_its_layout(folder: Path, two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "device=cpu", f"model={folder}", "layout.tensor=2", "layout.pipeline=2")["model"]
    assert found["layers_of_stages"] == [2, 1] and found["tensor"] == 2 and found["architecture"] == "LlamaForCausalLM"
    # 256 padded rows of 32, three layers, the last norm
    assert found["parameters"] == 256 * 32 + 3 * (32 * 32 * 3 + 32 * 64 * 3 + 64) + 32


def test_a_model_that_does_not_fit(folder: Path, two_ranks: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "device=cpu", f"model={folder}", "layout.tensor=4", code=1)
    assert "2 key/value heads are not divisible by layout.tensor=4" in found["verdict"] and found["model"] is None
    (folder / "model.safetensors").write_bytes(b"torn")
    assert "truncated or corrupt" in report(capsys, "device=cpu", f"model={folder}", code=1)["verdict"]
    assert "no such folder" in report(capsys, "device=cpu", "model=nowhere", code=1)["verdict"]


def test_the_disk_is_that_of_the_output(two_ranks: dict[str, Any], tmp_path: Path) -> None:
    found = doctor.examine(load(RunConfig, None, ["device=cpu", f"output={tmp_path}/not/there/yet"]))
    assert found["disk"]["path"] == str(tmp_path)
