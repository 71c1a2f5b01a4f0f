"""Traces of real programs."""

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.cache.record import Access, record

REPOSITORY = Path(__file__).resolve().parents[2]

SQLITE = """
import random, sqlite3
random.seed(1)
db = sqlite3.connect("file:table.db?mode=ro", uri=True)
for _ in range(20000):
    key = int(random.paretovariate(0.5)) * 7919 % 200000
    db.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
"""
FILL = "INSERT INTO facts VALUES (?, ?)"
C_FILE = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <pthread.h>\nint f%d;\n"


def _git(scratch: Path) -> Iterator[list[str]]:
    if not (scratch / "clone").exists():
        clone = ["git", "clone", "-q", "--no-local", str(REPOSITORY), "clone"]
        subprocess.run(clone, cwd=scratch, check=True, timeout=120)
    git = ["git", "-C", "clone"]
    yield [*git, "log", "-p", "-n", "60"]
    yield [*git, "status"]
    yield [*git, "grep", "-c", "fn "]
    yield [*git, "blame", "ARCHITECTURE.md"]
    yield [*git, "log", "--stat", "-n", "100"]
    yield [*git, "grep", "-c", "impl"]


def _sqlite(scratch: Path) -> Iterator[list[str]]:
    path = scratch / "table.db"
    if not path.exists():
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE facts (key INTEGER PRIMARY KEY, value TEXT)")
            rows = ((key, f"{key:0400}") for key in range(200_000))
            db.executemany(FILL, rows)
    yield [sys.executable, "-c", SQLITE]


def _compile(scratch: Path) -> Iterator[list[str]]:
    for number in range(12):
        (scratch / f"f{number}.c").write_text(C_FILE % number)
        yield ["cc", "-O1", "-c", f"f{number}.c", "-o", f"f{number}.o"]


def _grep(scratch: Path) -> Iterator[list[str]]:
    yield ["grep", "-r", "-c", "--exclude-dir=*-packages", "import", str(Path(subprocess.__file__).parent)]


def _scan(scratch: Path) -> Iterator[list[str]]:
    path = scratch / "large"
    if not path.exists():
        path.write_bytes(bytes(1 << 20) * 128)
    yield ["sha256sum", str(path)]


def _python(scratch: Path) -> Iterator[list[str]]:
    for module in ("json", "asyncio", "email.message", "http.client", "unittest", "sqlite3", "xml.dom") * 3:
        yield [sys.executable, "-B", "-c", f"import {module}"]


SOURCES: dict[str, Callable[[Path], Iterator[list[str]]]] = {
    "git": _git,
    "sqlite": _sqlite,
    "compile": _compile,
    "grep -r": _grep,
    "scan": _scan,
    "python": _python,
}
# Several programs share one cache; a scan in the middle is what must not flush it.
MIXES = {
    "sqlite, scan, sqlite": ("sqlite", "scan", "sqlite"),
    "compile, grep -r, compile": ("compile", "grep -r", "compile"),
    "everything, twice": ("git", "sqlite", "python", "scan", "compile", "grep -r") * 2,
}


def record_all(scratch: Path) -> dict[str, list[int]]:
    """Each trace as numbers, one a block."""
    recorded: dict[str, list[Access]] = {}
    for name, commands in SOURCES.items():
        recorded[name] = [access for command in commands(scratch) for access in record(command, scratch)]
    traces = {name: accesses for name, accesses in recorded.items() if name != "scan"}
    for name, parts in MIXES.items():
        traces[name] = [access for part in parts for access in recorded[part]]
    return {name: _numbered(accesses) for name, accesses in traces.items()}


def _numbered(accesses: list[Access]) -> list[int]:
    numbers: dict[Access, int] = {}
    return [numbers.setdefault(access, len(numbers)) for access in accesses]
