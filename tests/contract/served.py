"""Command lines in processes of their own, forked from one that imported torch and megatron once.

It is the same program in a tenth of the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Done:
    code: int
    """Exit code; -n when signal n ended it."""
    out: str
    err: str


class Job:
    """A command line that is running."""

    def __init__(self, server: Served, pid: int, folder: Path) -> None:
        self._server, self.pid, self._folder = server, pid, folder

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the signal to the command and all its ranks."""
        os.killpg(self.pid, number)

    def wait(self, within: float = 120.0) -> Done:
        """AssertionError, and the command is killed, when it takes longer."""
        try:
            code = self._server.read(within)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.kill()
            self._server.read(10.0)
            raise AssertionError(f"still running after {within} s; said:\n{self.out}\n{self.err}") from None
        return Done(code, self.out, self.err)

    @property
    def out(self) -> str:
        return (self._folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return (self._folder / "err").read_text(encoding="utf-8")


class Served:
    """`served("collect", "model=x", cwd=folder)` runs one command line.

    `start` lets the test do something meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count, self._said = folder, 0, b""
        plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **plain,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
        )

    def __call__(self, *argv: str, cwd: Path, within: float = 120.0) -> Done:
        return self.start(*argv, cwd=cwd).wait(within)

    def start(self, *argv: str, cwd: Path) -> Job:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        for name in ("out", "err"):
            (folder / name).touch()
        job = {"argv": argv, "cwd": str(cwd), "folder": str(folder)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Job(self, self.read(120.0), folder)

    def read(self, within: float) -> int:
        """The next number that the server says."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._said:  # by hand: what a buffered reader holds, select does not see
            ready, _, _ = select.select([pipe], [], [], within)
            if not ready:
                raise TimeoutError
            part = os.read(pipe, 4096)
            assert part, "the server of command lines is gone"
            self._said += part
        line, _, self._said = self._said.partition(b"\n")
        return int(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.kill()  # the interpreter's own shutdown takes seconds
        self._process.wait()


def serve() -> None:
    import torch

    from megatron_replay.parallel import shims

    for verb in ("collect", "train", "evaluate", "generate", "convert", "doctor", "store"):
        __import__(f"megatron_replay.stages.{verb}")
    import torch.utils.tensorboard

    shims.import_megatron()
    assert not torch.distributed.is_initialized()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def child(job: dict[str, Any]) -> None:
    from megatron_replay import cli

    os.setsid()
    os.chdir(job["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{job['folder']}/{name}", os.O_WRONLY), number)
    code = 1
    try:
        code = cli.main(job["argv"])
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
