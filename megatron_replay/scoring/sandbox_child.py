"""The process that runs foreign SQL: one JSON request a line in, one JSON answer a line out.

`sandbox.Sandbox` starts it as a script in an isolated interpreter, so it imports the standard library only. Several
fences stand behind each other:
- The file is opened read-only, and immutable: no lock, no journal.
- `query_only` is set.
- An authorizer lets nothing but reading pass.
- A progress handler watches the clock.
- The process may neither write a byte to a file nor use more memory than a limit.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

MEMORY = 512 << 20
"""Bytes of address space this process may have."""
RESULT = 64 << 20
"""Bytes of text and blobs a result may hold."""
STEPS = 1000
"""Virtual-machine instructions of SQLite between two looks at the clock: well under a millisecond."""
READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
FOREIGN_CODE = ("load_extension", "fts3_tokenizer")
ACTIONS = {
    getattr(sqlite3, f"SQLITE_{word}"): word
    for word in ("INSERT", "UPDATE", "DELETE", "PRAGMA", "ATTACH", "TRANSACTION")
}


class Refused(Exception):
    """The query went past a limit or asked for more than reading."""


def serve() -> int:
    """Answer requests until stdin closes.

    Returns 3 when memory ran out, because this interpreter cannot be trusted any further.
    """
    limit_process()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = run(**request)
            text = json.dumps(answer, default=lambda blob: {"hex": blob.hex()})
        except MemoryError:
            return 3
        print(text, flush=True)
    return 0


def limit_process() -> None:
    """Forbid writing files and core dumps, and bound the memory."""
    import resource  # only where there is one to limit: a POSIX process of its own

    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))


def run(database: str, sql: str, seconds: float, max_rows: int) -> dict[str, Any]:
    """{"rows": [...]}, {"error": the query's fault} or {"database": the file's fault}."""
    try:
        db = connect(Path(database))
    except sqlite3.Error as err:
        return {"database": str(err)}
    denied = authorize(db)
    end = time.monotonic() + seconds
    db.set_progress_handler(lambda: time.monotonic() > end, STEPS)
    try:
        return {"rows": fetch(db.execute(sql), max_rows)}
    except Refused as err:
        return {"error": str(err)}
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as err:
        if denied:
            return {"error": f"refused: {denied[0]}"}
        return {"error": f"time limit of {seconds:g} s" if str(err) == "interrupted" else str(err)}
    finally:
        db.close()


def connect(path: Path) -> sqlite3.Connection:
    """Open read-only, and immutable unless a log beside the file says that part of the data is still there."""
    pending = any(Path(f"{path}{end}").exists() for end in ("-wal", "-journal"))
    db = sqlite3.connect(
        path.resolve().as_uri() + ("?mode=ro" if pending else "?mode=ro&immutable=1"), uri=True, isolation_level=None
    )
    db.text_factory = lambda raw: raw.decode("utf-8", "backslashreplace")  # Latin-1 bytes stay visible and comparable
    for setting in ("query_only=ON", "trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "temp_store=MEMORY"):
        db.execute(f"PRAGMA {setting}")
    # reads the header and the schema: a damaged file is found here
    db.execute("SELECT count(*) FROM sqlite_master").fetchall()
    return db


def authorize(db: sqlite3.Connection) -> list[str]:
    """Let only reading pass. The names of everything refused are added to the returned list."""
    denied: list[str] = []

    def check(action: int, first: str | None, second: str | None, *_: object) -> int:
        if action in READING and not (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in FOREIGN_CODE):
            return sqlite3.SQLITE_OK
        denied.append(
            f"function {second}" if action == sqlite3.SQLITE_FUNCTION else ACTIONS.get(action, f"action {action}")
        )
        return sqlite3.SQLITE_DENY

    db.set_authorizer(check)
    return denied


def fetch(cursor: sqlite3.Cursor, max_rows: int) -> list[tuple[Any, ...]]:
    """The rows. Never more than the limits on rows and bytes are held."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in cursor:
        size += sum(len(cell) for cell in row if isinstance(cell, (str, bytes)))
        if len(rows) == max_rows:
            raise Refused(f"row limit of {max_rows}")
        if size > RESULT:
            raise Refused(f"size limit of {RESULT >> 20} MiB")
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(serve())
