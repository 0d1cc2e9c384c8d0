"""Run SQL that nobody vouches for: read-only, in a child process with limits on time, rows and memory.

It has a process of its own because SQLite's own limits have gaps. Its progress handler is not called while a query is
prepared (nested CTEs grow exponentially there) nor inside one long function call. Its memory limit would hold for
everything else in the process too.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_replay.errors import DataError
from megatron_replay.scoring.sqltext import statements

CHILD = Path(__file__).with_name("sandbox_child.py")
START_LIMIT = 60.0
"""Seconds that a child may take to start. An interpreter on a slow network disk needs some."""
GRACE = 1.0
"""Seconds after its own time limit at which a child is killed."""

Cell = int | float | str | bytes | None
Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a query: its rows, or one line that says why there are none."""

    rows: list[Row]
    error: str | None = None


class Sandbox:
    """A child process for many queries; use it as a context manager.

    It starts with the first query, starts again after one that had to be killed, and ends with `close`. A query costs
    about a millisecond, starting a child about 50.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def execute(self, database: str | Path, sql: str, *, seconds: float = 5.0, max_rows: int = 10_000) -> Outcome:
        """Run one SELECT (or WITH, VALUES) on an SQLite file; see `execute`."""
        path = Path(database)
        if not path.is_file():
            raise DataError(f"{path}: no such database; give the path of an SQLite file")
        try:
            query = _one_query(sql)
        except ValueError as err:
            return Outcome([], f"refused: {err}")
        answer = self._ask({"database": str(path), "sql": query, "seconds": seconds, "max_rows": max_rows}, seconds)
        if "database" in answer:
            raise DataError(f"{path}: not a readable SQLite database: {answer['database']}")
        if "error" in answer:
            return Outcome([], str(answer["error"]))
        return Outcome([tuple(_cell(cell) for cell in row) for row in answer["rows"]])

    def close(self) -> None:
        """End the child, even in the middle of a query."""
        child, self._child, self._unread = self._child, None, b""
        if child is not None:
            child.kill()
            child.communicate()

    def _ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        child = self._started()
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            line = self._line(child, seconds + GRACE)
        except TimeoutError:
            self.close()
            return {"error": f"time limit of {seconds:g} s"}
        except BrokenPipeError:
            line = b""
        if line:
            return dict(json.loads(line))
        code = child.wait()
        self.close()
        return {"error": "memory limit" if code == 3 else f"SQLite stopped on this query (exit {code})"}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.close()
        # -I -S keep the environment and site-packages out. It has a session of its own, so that Ctrl-C reaches only the
        # parent.
        command = [sys.executable, "-I", "-S", str(CHILD)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True)
        if self._line(self._child, START_LIMIT) != b"ready":
            raise RuntimeError(f"the process that runs SQL did not start: {' '.join(command)}")
        return self._child

    def _line(self, child: subprocess.Popen[bytes], seconds: float) -> bytes:
        """The child's next line, or an empty one at its end. Raises TimeoutError."""
        assert child.stdout is not None
        end = time.monotonic() + seconds
        parts = [self._unread]
        while b"\n" not in parts[-1]:
            if not select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(child.stdout.fileno(), 1 << 20)
            if not part:
                return b""
            parts.append(part)
        line, _, self._unread = b"".join(parts).partition(b"\n")
        return line


def execute(database: str | Path, sql: str, *, seconds: float = 5.0, max_rows: int = 10_000) -> Outcome:
    """Run one query on an SQLite file, read-only, in a process of its own. For many queries keep a `Sandbox`.

    The outcome holds the rows, or an error:
    - SQLite's own words
    - "refused: ..." for anything but reading
    - "time limit of 5 s", "row limit of 10000", "size limit ...", "memory limit"

    Text that is not UTF-8 comes back with \\x escapes. Raises DataError when the file is missing or not a database.
    """
    with Sandbox() as sandbox:
        return sandbox.execute(database, sql, seconds=seconds, max_rows=max_rows)


def _one_query(sql: str) -> str:
    """The single query in the text, checked before SQLite sees it. Raises ValueError for anything else."""
    try:
        sql.encode()
    except UnicodeEncodeError:
        raise ValueError("not text (a lone surrogate)") from None
    if "\0" in sql:
        raise ValueError("a null character")
    parts = statements(sql)
    if len(parts) != 1:
        raise ValueError("more than one statement" if parts else "no statement")
    first = parts[0][0].text.lower()
    if first not in ("select", "with", "values"):
        raise ValueError(f"{first[:20]!r} is not SELECT")
    return sql[: parts[0][-1].stop]


def _cell(value: Any) -> Cell:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
