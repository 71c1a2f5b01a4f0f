"""SQLite and Redis: what they acknowledged is there after a kill in the middle."""

import contextlib
import json
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from tests.programs.conftest import Desk, kill

_WRITER = textwrap.dedent(
    """
    import sqlite3, sys
    database = sqlite3.connect("orders.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=" + sys.argv[1])
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, half INTEGER)")
    for number in range(1_000_000):
        database.execute("BEGIN IMMEDIATE")
        for half in (1, 2):
            database.execute("INSERT INTO orders (half) VALUES (?)", (half,))
        database.execute("COMMIT")
        print(number, flush=True)
    """
)

_CHECK = textwrap.dedent(
    """
    import json, sqlite3
    database = sqlite3.connect("orders.db")
    whole = database.execute("PRAGMA integrity_check").fetchone()[0]
    count = "SELECT count(*) FROM orders WHERE half=?"
    halves = [database.execute(count, (half,)).fetchone()[0] for half in (1, 2)]
    print(json.dumps([whole, *halves]))
    """
)


def _killed_after(desk: Desk, lines: int, *command: str) -> int:
    """Starts a program, kills it after it printed so many lines, returns how many it printed in all."""
    process = desk.start(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = 0
    for _ in process.stdout:
        printed += 1
        if printed == lines:
            kill(process)
    process.stdout.close()
    assert printed >= lines, f"the program ended by itself after {printed} lines"
    return printed


def test_sqlite_keeps_what_it_committed_when_killed(desk: Desk) -> None:
    beside = desk.without_preload()
    for mode in ("WAL", "DELETE"):
        done = 0
        for rounds in range(1, 4):
            printed = _killed_after(desk, 20 * rounds, "python3", "-c", _WRITER, mode)
            done += printed
            whole, first, second = json.loads(beside.run("python3", "-c", _CHECK).stdout)
            assert whole == "ok"
            assert first == second
            assert first in (done, done + 1), "only the transaction under way may be missing or there"
            done = first
        desk.sh("rm orders.db*")


def test_redis_keeps_what_it_acknowledged_when_killed(other_desk: Desk) -> None:
    with _redis(other_desk) as (process, cli):
        acknowledged = 0
        for number in range(300):
            answer = cli("set", f"key:{number}", "v" * (number % 50))
            acknowledged += answer == "OK"
        kill(process)
    assert acknowledged == 300
    with _redis(other_desk) as (_, cli):
        assert int(cli("dbsize")) == 300
        assert cli("bgrewriteaof") != ""
        assert cli("get", "key:49") == "v" * 49


@contextlib.contextmanager
def _redis(desk: Desk) -> Iterator[tuple["subprocess.Popen[bytes]", "_Cli"]]:
    socket = desk.directory / "redis.sock"
    words = ["--port", "0", "--unixsocket", str(socket), "--appendonly", "yes", "--appendfsync", "always"]
    words += ["--save", "", "--dir", str(desk.directory)]
    log = desk.place.directory / "redis.log"
    with log.open("wb") as output:
        process = desk.start("redis-server", *words, stdout=output)
    cli = _Cli(desk, socket)
    deadline = time.monotonic() + 20
    while cli("ping") != "PONG":
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    try:
        yield process, cli
    finally:
        kill(process)


class _Cli:
    def __init__(self, desk: Desk, socket: Path) -> None:
        self._desk, self._socket = desk, socket

    def __call__(self, *words: str) -> str:
        return self._desk.run("redis-cli", "-s", self._socket, *words, check=False).stdout.strip()
