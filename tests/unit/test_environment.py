"""The variables ranks should have: what is told of those that are set, missing and wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_replay import device
from megatron_replay.environment import VARIABLES, check, completed

RIGHT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
    "HCCL_CONNECT_TIMEOUT": "3600",
    "HCCL_EXEC_TIMEOUT": "3600",
    "CPU_AFFINITY_CONF": "1",
    "TASK_QUEUE_ENABLE": "2",
    "OMP_NUM_THREADS": "1",
}
"""The variables that an NPU run of one node has."""


def states(kind: str, environ: dict[str, str], nodes: int = 1) -> dict[str, str]:
    return {finding.name: finding.state for finding in check(kind, environ, nodes=nodes)}


def test_an_npu_run_wants_these_and_gets_them() -> None:
    missing = check("npu", {})
    assert {finding.state for finding in missing} == {"missing"}
    assert completed(missing) == RIGHT
    assert set(states("npu", RIGHT).values()) == {"set"}
    assert states("npu", RIGHT).keys() == RIGHT.keys()


def test_several_nodes_are_asked_for_their_network() -> None:
    found = states("npu", RIGHT, nodes=2)
    assert {name for name, state in found.items() if state == "missing"} == {"HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    assert completed(check("npu", RIGHT, nodes=2)) == RIGHT  # only the site knows
    assert states("cpu", {}, nodes=2) == {"GLOO_SOCKET_IFNAME": "missing", "OMP_NUM_THREADS": "missing"}
    assert states("cuda", {}, nodes=2).keys() == {
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
    }


@pytest.mark.parametrize(
    ("name", "value", "state"),
    [
        ("HCCL_CONNECT_TIMEOUT", "119", "wrong"),
        ("HCCL_CONNECT_TIMEOUT", "120", "set"),
        ("HCCL_CONNECT_TIMEOUT", "7200", "set"),
        ("HCCL_CONNECT_TIMEOUT", "7201", "wrong"),
        ("HCCL_CONNECT_TIMEOUT", "1h", "wrong"),
        ("HCCL_EXEC_TIMEOUT", "0", "set"),
        ("HCCL_IF_BASE_PORT", "80", "wrong"),
        ("HCCL_IF_BASE_PORT", "50000", "set"),
        ("PYTORCH_NPU_ALLOC_CONF", "max_split_size_mb:32,garbage_collection_threshold:0.6", "set"),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments=True", "wrong"),
        ("CPU_AFFINITY_CONF", "1,npu0:0-23", "set"),
        ("CPU_AFFINITY_CONF", "3", "wrong"),
        ("TASK_QUEUE_ENABLE", "", "wrong"),
        ("HCCL_SOCKET_IFNAME", "eth0,eth1", "set"),
        ("HCCL_SOCKET_IFNAME", "eth0 eth1", "wrong"),
        ("HCCL_DETERMINISTIC", "1", "wrong"),
        ("ASCEND_RT_VISIBLE_DEVICES", "0-3,6", "set"),
        ("ASCEND_RT_VISIBLE_DEVICES", "0;1", "wrong"),
    ],
)
def test_a_value_is_what_its_maker_allows(name: str, value: str, state: str) -> None:
    assert states("npu", {**RIGHT, name: value})[name] == state


def test_what_it_says() -> None:
    said = {
        finding.name: str(finding)
        for finding in check("npu", {"HCCL_CONNECT_TIMEOUT": "60", "TASK_QUEUE_ENABLE": "1"}, nodes=2)
    }
    assert said["HCCL_CONNECT_TIMEOUT"].startswith("HCCL_CONNECT_TIMEOUT=60 is wrong: 3600 (seconds (120..7200)")
    assert said["TASK_QUEUE_ENABLE"].startswith("TASK_QUEUE_ENABLE=1 (usual: 2;")
    assert said["HCCL_SOCKET_IFNAME"].startswith("HCCL_SOCKET_IFNAME is missing: the site's own value")
    assert said["CPU_AFFINITY_CONF"].startswith("CPU_AFFINITY_CONF is missing: 1 (")


def test_a_wanted_value_is_allowed() -> None:
    for kind in ("npu", "cuda", "cpu"):
        wanted = {v.name: v.wanted for v in VARIABLES if kind in v.devices and v.wanted}
        assert set(states(kind, wanted).values()) == {"set"}


def test_the_device_seam_reads_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.setenv(variable.name, "7")
    assert {variable.name for variable in VARIABLES} <= device.environment().keys()


def test_the_page_lists_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "launch.md").read_text(encoding="utf-8")
    for v in VARIABLES:
        assert (
            f"| `{v.name}` | {f'`{v.wanted}`' if v.wanted else 'yours'} | {', '.join(v.devices)} | {v.when} |" in page
        ), v.name
