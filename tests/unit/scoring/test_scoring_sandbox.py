"""Foreign SQL: what is not a query is refused, what never ends is ended, and the database file stays as it was."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from megatron_replay.errors import DataError
from megatron_replay.scoring import sandbox_child
from megatron_replay.scoring.sandbox import GRACE, Outcome, Sandbox, execute

DOUBLED = 30  # a query whose names double this often would need 2^30 nodes just to be prepared
LAUGHS = (
    "WITH a0 AS (SELECT 1 AS v UNION ALL SELECT 2)"
    + "".join(f", a{i} AS (SELECT x.v + y.v AS v FROM a{i - 1} x JOIN a{i - 1} y)" for i in range(1, DOUBLED))
    + f" SELECT count(*) FROM a{DOUBLED - 1}"
)
ONE_CALL = (  # a quadratic search of some minutes, inside a single instruction of SQLite's machine
    "WITH s(x, y) AS (SELECT replace(hex(zeroblob(4990000)), '0', 'a'), replace(hex(zeroblob(2400000)), '0', 'a') || "
    "'b') "
    "SELECT instr(x, y) FROM s"
)
REFUSED = {
    "DROP TABLE t": "refused: 'drop' is not SELECT",
    "INSERT INTO t VALUES (1, 'x')": "refused: 'insert' is not SELECT",
    "ATTACH 'other.sqlite' AS other": "refused: 'attach' is not SELECT",
    "PRAGMA query_only = OFF": "refused: 'pragma' is not SELECT",
    "VACUUM INTO 'copy.sqlite'": "refused: 'vacuum' is not SELECT",
    "EXPLAIN SELECT 1": "refused: 'explain' is not SELECT",
    "/* SELECT */ DELETE FROM t": "refused: 'delete' is not SELECT",
    "SELECT 1; DROP TABLE t": "refused: more than one statement",
    "SELECT 1 /* ; */ ; -- \n DELETE FROM t": "refused: more than one statement",
    "WITH x AS (SELECT 1) DELETE FROM t": "refused: DELETE",
    "WITH x AS (SELECT 1) UPDATE t SET a = 0": "refused: UPDATE",
    "WITH x AS (SELECT 1) INSERT INTO t SELECT 1, 'x'": "refused: INSERT",
    "SELECT load_extension('evil.so')": "refused: function load_extension",
    "SELECT fts3_tokenizer('simple')": "refused: function fts3_tokenizer",
    "SELECT writefile('copied', 'x')": "no such function: writefile",
    "": "refused: no statement",
    " ; -- nothing": "refused: no statement",
    "SELECT 'a\0b'": "refused: a null character",
    "SELECT '\ud800'": "refused: not text (a lone surrogate)",
}
ENDLESS = {
    "recursion": (
        "WITH RECURSIVE r(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM r) SELECT count(*) FROM r",
        "time limit of 0.3 s",
    ),
    "cross join": ("SELECT count(*) FROM t a, t b, t c, t d, t e", "time limit of 0.3 s"),
    "rows": ("SELECT a.a FROM t a, t b", "row limit of 10000"),
    "bytes": ("SELECT hex(zeroblob(20000)) FROM t a, t b", "size limit of 64 MiB"),
    "zeroblob": ("SELECT zeroblob(1000000000)", "memory limit"),
    "printf": ("SELECT printf('%1000000000d', 1)", "memory limit"),
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as box:
        yield box


@pytest.fixture
def database(tmp_path: Path):
    path = tmp_path / "a #1? file%20.sqlite"  # characters that mean something in a URI
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (a INTEGER, b TEXT)")
        db.executemany("INSERT INTO t VALUES (?, ?)", [(i, f"name {i}") for i in range(300)])
    db.close()
    before = digest(path)
    yield path
    assert digest(path) == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "a file appeared beside the database"


@pytest.mark.parametrize("sql", REFUSED)
def test_what_only_looks_like_a_query_is_refused_with_its_reason(sandbox: Sandbox, database: Path, sql: str) -> None:
    assert sandbox.execute(database, sql) == Outcome([], REFUSED[sql])


@pytest.mark.parametrize("name", ENDLESS)
def test_what_does_not_end_is_ended(sandbox: Sandbox, database: Path, name: str) -> None:
    sql, reason = ENDLESS[name]
    begin = time.monotonic()
    assert sandbox.execute(database, sql, seconds=0.3 if "time" in reason else 5.0).error == reason
    assert time.monotonic() - begin < 4
    assert sandbox.execute(database, "SELECT count(*) FROM t").rows == [(300,)], (
        "the next query must find a working process"
    )


@pytest.mark.parametrize("sql", [LAUGHS, ONE_CALL], ids=["while it is prepared", "in one call"])
def test_where_sqlite_does_not_look_at_the_clock_the_process_is_killed(
    sandbox: Sandbox, database: Path, sql: str
) -> None:
    begin = time.monotonic()
    assert sandbox.execute(database, sql, seconds=0.2).error in ("time limit of 0.2 s", "memory limit")
    assert time.monotonic() - begin < 0.2 + GRACE + 2
    assert sandbox.execute(database, "SELECT 1").rows == [(1,)]


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE t",
        "ATTACH ':memory:' AS m",
        "PRAGMA query_only = OFF",
        "BEGIN",
        "CREATE TEMP TABLE x (a)",
        "ANALYZE",
    ],
)
def test_the_authorizer_refuses_by_itself(database: Path, sql: str) -> None:
    assert sandbox_child.run(str(database), sql, 5.0, 10)["error"].startswith("refused: ")


@pytest.mark.parametrize("sql", ["SELECT * FROM pragma_database_list", "SELECT * FROM pragma_table_info('t')"])
def test_pragma_functions_tell_nothing(sandbox: Sandbox, database: Path, sql: str) -> None:
    assert sandbox.execute(database, sql).error.startswith("refused: ")


def test_the_file_is_opened_read_only_even_without_the_authorizer(database: Path) -> None:
    db = sandbox_child.connect(database)
    assert db.execute("PRAGMA query_only").fetchone() == (1,)
    db.execute("PRAGMA query_only = OFF")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        db.execute("DELETE FROM t")
    db.close()


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        " select 1 ;",
        "SELECT 1;; -- done",
        "-- first\nSELECT 1 /* x */",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "VALUES (1)",
    ],
)
def test_queries_pass(sandbox: Sandbox, database: Path, sql: str) -> None:
    assert sandbox.execute(database, sql) == Outcome([(1,)])


def test_values_keep_their_types(sandbox: Sandbox, database: Path) -> None:
    rows = sandbox.execute(database, "SELECT 1, 1.0, NULL, 'é', x'00ff', 9e999, 9223372036854775807").rows
    assert rows == [(1, 1.0, None, "é", b"\x00\xff", float("inf"), 2**63 - 1)]
    assert [type(cell) for cell in rows[0]] == [int, float, type(None), str, bytes, float, int]


def test_broken_utf8_is_shown_not_raised(sandbox: Sandbox, database: Path) -> None:
    assert sandbox.execute(database, "SELECT CAST(x'636166e9' AS TEXT)").rows == [("caf\\xe9",)]


def test_exactly_max_rows_is_no_error(sandbox: Sandbox, database: Path) -> None:
    assert len(sandbox.execute(database, "SELECT a FROM t", max_rows=300).rows) == 300
    assert sandbox.execute(database, "SELECT a FROM t", max_rows=299).error == "row limit of 299"


def test_sqlite_says_what_is_wrong(sandbox: Sandbox, database: Path) -> None:
    assert sandbox.execute(database, "SELECT nope FROM t").error == "no such column: nope"


def test_rows_still_in_the_write_ahead_log_are_seen(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "live.sqlite"
    writer = sqlite3.connect(path)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE t (a)")
    writer.execute("INSERT INTO t VALUES (7)")
    writer.commit()
    assert sandbox.execute(path, "SELECT a FROM t").rows == [(7,)]
    writer.close()


def test_a_child_that_was_killed_is_started_again(database: Path) -> None:
    with Sandbox() as box:
        box.execute(database, "SELECT 1")
        box._child.kill()
        box._child.wait()
        assert box.execute(database, "SELECT 2").rows == [(2,)]


def test_a_missing_or_damaged_file_is_the_users_mistake(
    sandbox: Sandbox, database: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bad")
    with pytest.raises(DataError, match=r"none\.sqlite: no such database"):
        sandbox.execute(folder / "none.sqlite", "SELECT 1")
    (folder / "text.sqlite").write_text("not a database at all, but long enough to have a header of its own" * 10)
    with pytest.raises(DataError, match=r"text\.sqlite: not a readable SQLite database"):
        execute(folder / "text.sqlite", "SELECT 1")
    shutil.copy(database, folder / "schema.sqlite")
    data = bytearray(database.read_bytes())
    where = data.index(b"CREATE TABLE")
    data[where : where + 12] = b"CREATE TABXE"
    (folder / "schema.sqlite").write_bytes(data)
    with pytest.raises(DataError, match="malformed"):
        sandbox.execute(folder / "schema.sqlite", "SELECT 1")
