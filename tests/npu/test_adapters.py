"""The adapter between megatron-core and the NPU is chosen by probing.

FAKE packages stand for MindSpeed, MegatronAdaptor and torch-npu: they only note how they were imported. Nothing of the
real ones is run (they need CANN); what they ask of a trainer was read in their sources (docs/ascend.md).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
CORE = version("megatron-core")
FAKE = '''"""A fake for tests."""
import sys
IS_A_FAKE = True
ARGV = list(sys.argv)
MEGATRON_WAS_THERE = "megatron.core" in sys.modules
'''


def fake(folder: Path, module: str, *, package: str = "", of: str | None = None, text: str = FAKE) -> None:
    """A module that notes how it is imported, and the metadata of its package, made for a version of megatron-core."""
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for parent in path.relative_to(folder).parents:
        if parent != Path("."):
            (folder / parent / "__init__.py").touch()
    if of is not None:
        info = folder / f"{package.replace('-', '_')}-{of}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {of}\n")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a fake of torch-npu's transfer_to_npu, found before everything else."""
    fake(tmp_path, "torch_npu.contrib.transfer_to_npu")
    return tmp_path


def probe(folder: Path, *words: str) -> Any:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE.parents[1])]),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, str(HERE / "children" / "adapter.py"), "--tensor-model-parallel-size", "4", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def mindspeed(folder: Path, of: str | None, text: str = FAKE) -> None:
    fake(folder, "mindspeed.megatron_adaptor", package="mindspeed", of=of, text=text)


def adaptor(folder: Path, of: str | None) -> None:
    fake(folder, "megatron_adaptor.__init__", package="megatron-adaptor", of=of)


def test_none_is_transfer_to_npu_and_our_shims(here: Path) -> None:
    found = probe(here, "install")
    assert found["chosen"] == "none" and found["notes"] == [] and found["error"] == ""
    assert [saw["name"] for saw in found["saw"]] == ["torch_npu.contrib.transfer_to_npu"]
    assert {"tensor_type", "capability", "rotary", "group_step"} <= set(found["installed"])
    assert found["on_cpu"] == "none"


def test_mindspeed_for_this_megatron_core(here: Path) -> None:
    """Its version is that of the megatron-core it is made for; it brings what our shim tensor_type does."""
    mindspeed(here, ".".join(CORE.split(".")[:2]) + ".0")
    found = probe(here, "install")
    assert found["chosen"] == "mindspeed" and found["notes"] == []
    (saw,) = found["saw"]
    assert saw["name"] == "mindspeed.megatron_adaptor" and not saw["megatron_was_there"]
    assert len(saw["argv"]) == 1 and found["argv_restored"], "it would read our command line"
    assert "tensor_type" not in found["installed"] and {"rotary", "group_step"} <= set(found["installed"])


def test_the_probe_imports_nothing(here: Path) -> None:
    mindspeed(here, CORE)
    adaptor(here, CORE)
    assert probe(here)["imported_by_probe"] == []


def test_megatron_adaptor_for_this_megatron_core(here: Path) -> None:
    adaptor(here, CORE)
    found = probe(here, "install")
    assert found["chosen"] == "megatron_adaptor" and [saw["name"] for saw in found["saw"]] == ["megatron_adaptor"]


def test_an_adapter_for_another_megatron_core_is_not_used(here: Path) -> None:
    mindspeed(here, "0.9.0")
    adaptor(here, "0.17.0")
    found = probe(here)
    assert found["chosen"] == "none"
    assert found["notes"] == [
        f"mindspeed 0.9.0 is installed and not used: it is made for megatron-core 0.9.0, here is {CORE}",
        f"megatron-adaptor 0.17.0 is installed and not used: it is made for megatron-core 0.17.0, here is {CORE}",
    ]


def test_of_two_that_fit_the_first_is_used(here: Path) -> None:
    mindspeed(here, CORE)
    adaptor(here, CORE)
    found = probe(here)
    assert found["chosen"] == "mindspeed" and found["notes"] == [f"megatron-adaptor {CORE} is installed and not used"]


def test_an_adapter_without_metadata_is_told(here: Path) -> None:
    mindspeed(here, None)
    found = probe(here)
    assert found["chosen"] == "none"
    assert found["notes"] == [
        "mindspeed is here and not used: pip does not know its version; install it with pip install -e"
    ]


def test_an_adapter_that_cannot_be_imported_is_an_error(here: Path) -> None:
    mindspeed(here, CORE, text="raise ImportError('libhccl.so: cannot open')\n")
    found = probe(here, "install")
    assert found["error"] == (
        "mindspeed.megatron_adaptor cannot be imported (ImportError: libhccl.so: cannot open); repair or uninstall "
        "mindspeed"
    )
    assert found["argv_restored"]


def test_megatron_must_not_be_imported_before(here: Path) -> None:
    assert "must come first" in probe(here, "install", "import-megatron-first")["error"]
