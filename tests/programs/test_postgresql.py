"""PostgreSQL: concurrent transactions, a clean restart, a kill in the middle."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.programs.conftest import Desk, desk_named, kill

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
_START_TIMEOUT_S = 60.0
_CLIENTS, _TRANSACTIONS = 4, 50

pytestmark = pytest.mark.skipif(not _BINARIES, reason="Debian's package postgresql is not installed")

# Every transaction of pgbench moves an amount in three tables and notes it in a fourth.
_SUMS = """
    SELECT (SELECT count(*) FROM pgbench_history),
        (SELECT count(DISTINCT balance) FROM (
            SELECT sum(abalance) AS balance FROM pgbench_accounts
            UNION ALL SELECT sum(tbalance) FROM pgbench_tellers
            UNION ALL SELECT sum(bbalance) FROM pgbench_branches
            UNION ALL SELECT coalesce(sum(delta), 0) FROM pgbench_history) AS sums)
"""


@pytest.fixture(params=["dir-ordinary", "union-ordinary"])  # PostgreSQL refuses to be root's
def desk(request: pytest.FixtureRequest, isolated: Isolated) -> Iterator[Desk]:
    yield from desk_named(isolated, str(request.param))


class Server:
    """A running server; its socket has a name and no place, since paths may be too long for one."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.process: subprocess.Popen[bytes]
        self._socket = f"@polytropo-{desk.directory}"[-90:]
        if not self._socket.startswith("@"):
            self._socket = f"@{self._socket}"

    def start(self) -> None:
        log = self.desk.place.directory / "postgres.log"
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self._socket,
            "shared_buffers": "16MB",
            "dynamic_shared_memory_type": "mmap",
        }
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        deadline = time.monotonic() + _START_TIMEOUT_S
        while True:
            with log.open("wb") as output:
                self.process = self.desk.start(_program("postgres"), "-D", "data", *words, stdout=output)
            while self.process.poll() is None and time.monotonic() < deadline:
                if self.client("pg_isready", check=False).returncode == 0:
                    return
                time.sleep(0.05)
            # The processes of a server that was killed take a moment to see it.
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def client(self, program: str, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self.desk.run(_program(program), *self.words(*words), check=check)

    def words(self, *words: str) -> list[str]:
        return ["-h", self._socket, "-U", "postgres", *words]

    def state(self) -> tuple[int, int]:
        """How many transactions there were, and how many different sums they left: one, if all is right."""
        told = self.client("psql", "-d", "postgres", "-Atc", _SUMS).stdout
        transactions, sums = map(int, told.split("|"))
        return transactions, sums

    def stop(self) -> None:
        self.desk.run(_program("pg_ctl"), "-D", "data", "-m", "fast", "-w", "stop")
        self.process.wait(60)


def _program(name: str) -> Path:
    return _BINARIES[-1].with_name(name)


def test_postgresql_keeps_what_it_committed(desk: Desk) -> None:
    desk.run(
        _program("initdb"), "-D", "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--data-checksums"
    )
    server = Server(desk)
    server.start()
    try:
        server.client("pgbench", "-i", "-q", "-s", "1", "postgres")
        rounds = ["-c", str(_CLIENTS), "-j", "2", "-t", str(_TRANSACTIONS), "-n", "postgres"]
        server.client("pgbench", *rounds)
        assert server.state() == (_CLIENTS * _TRANSACTIONS, 1)
        server.stop()
        desk.run(_program("pg_checksums"), "--check", "-D", "data")
        server.start()
        assert server.state() == (_CLIENTS * _TRANSACTIONS, 1)
        seen = _killed_in_the_middle(server)
        server.start()
        transactions, sums = server.state()
        assert sums == 1 and transactions >= seen
        server.stop()
    finally:
        kill(server.process)


def _killed_in_the_middle(server: Server) -> int:
    """Kills the server while clients work; returns how many transactions had been seen committed."""
    before, _ = server.state()
    words = server.words("-c", str(_CLIENTS), "-T", "300", "-n", "postgres")
    clients = server.desk.start(_program("pgbench"), *words, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (seen := server.state()[0]) < before + 50:
            assert clients.poll() is None and time.monotonic() < deadline
    finally:
        kill(server.process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            clients.wait(30)  # they have lost their server
        kill(clients)
    return seen
