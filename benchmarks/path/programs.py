"""Whole programs on each side: what they take, and how many calls of theirs still reach the kernel."""

import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common.report import Report
from benchmarks.path.places import TIMEOUT_S, Place, command

STARTS = 100
C_FILES = 8
RECORDS = 30_000
DB_BENCHMARKS = ("fillrandom", "overwrite", "readrandom", "readwhilewriting")
_DB_FIGURE = re.compile(r"^(\w+)\s*:\s*([\d.]+) micros/op", re.MULTILINE)

SQLITE = """
import random, sqlite3
database = sqlite3.connect("orders.db", isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.execute("PRAGMA synchronous=NORMAL")
database.execute("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, text TEXT)")
dice = random.Random(1)
for group in range(60):
    database.execute("BEGIN")
    for _ in range(50):
        database.execute("INSERT INTO orders (text) VALUES (?)", ("x" * dice.randrange(200),))
    database.execute("COMMIT")
for _ in range(3000):
    database.execute("SELECT text FROM orders WHERE id = ?", (dice.randrange(1, 3000),)).fetchone()
database.execute("DROP TABLE orders")
"""
PYTHON = "/usr/bin/python3"

# What is run, hot: a name, words, and whether it may be run again at once.
PROGRAMS: dict[str, tuple[str, ...]] = {
    "git status": ("git", "-C", "tree", "status", "--porcelain"),
    "find": ("find", "tree", "-type", "f", "-size", "+2k"),
    "grep -r": ("grep", "-rc", "needle", "tree"),
    "compile a C project": ("make", "-C", "project", "-s", "-B"),
    "SQLite": (PYTHON, "-c", SQLITE),
}
_STORAGE_CALLS = """
open openat openat2 creat close read pread64 readv preadv write pwrite64 writev pwritev lseek stat fstat
lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents64 rename renameat renameat2
link linkat symlink symlinkat unlink unlinkat mkdir mkdirat rmdir truncate ftruncate fallocate fsync
fdatasync sync_file_range chmod fchmod fchmodat chown fchown fchownat utimensat mmap flock fcntl fadvise64
copy_file_range sendfile getxattr lgetxattr fgetxattr listxattr statfs fstatfs chdir
"""
STORAGE_CALLS = frozenset(_STORAGE_CALLS.split())
_CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")


def fill(directory: Path) -> Path:
    """A repository of 600 files, and a small C project."""
    tree, project = directory / "tree", directory / "project"
    tree.mkdir(parents=True)
    dice = random.Random(3)
    for number in range(600):
        place = tree / f"d{number % 20}"
        place.mkdir(exist_ok=True)
        words = (dice.choice(("alpha", "beta", "gamma", "needle")) for _ in range(dice.randrange(1200)))
        (place / f"f{number}.c").write_text(" ".join(words))
    identity = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
    command("git", "-C", tree, "init", "-q")
    command("git", "-C", tree, "add", ".")
    command("git", "-C", tree, *identity, "commit", "-qm", "all")
    project.mkdir()
    objects = " ".join(f"f{number}.o" for number in range(C_FILES))
    for number in range(C_FILES):
        (project / f"f{number}.c").write_text(
            f"#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n"
            f'int f{number}(void) {{ return printf("%d\\n", {number}); }}\n'
        )
    (project / "main.c").write_text("int f0(void);\nint main(void) { return f0() < 0; }\n")
    (project / "Makefile").write_text(f"all: main.o {objects}\n\t$(CC) -o all $^\n")
    return directory


def measure(report: Report, places: list[Place], rounds: int) -> None:
    """Adds the programs' times; the sides alternate. Elapsed time, but for starts processor time."""
    for number in range(rounds):
        turn = number % len(places)
        for place in places[turn:] + places[:turn]:
            for name, words in PROGRAMS.items():
                if number == 0:
                    _elapsed_ns(place, words)
                report.add(name, place.side, _elapsed_ns(place, words))
            _rocksdb(report, place)
            report.add("start of `true`, processor time", place.side, _start_ns(place))


def count_calls(report: Report, places: list[Place]) -> None:
    """Adds how many storage calls of the programs on a place's files reach the kernel."""
    for name, words in PROGRAMS.items():
        for place in places:
            log = place.directory.with_name(f"{place.directory.name}.strace")
            # The tracer itself is not preloaded; the files that it sees are those on the mount.
            given = [f"--env={key}={value}" for key, value in place.variables.items()]
            tracing = ["strace", "-f", "-y", "-qq", "--signal=none", "-o", str(log), *given]
            subprocess.run(
                [*tracing, *words],
                cwd=place.directory,
                stdout=subprocess.DEVNULL,
                timeout=TIMEOUT_S * 2,
                check=True,
            )
            report.add(f"calls of {name}", place.side, _counted(log, place.directory), "count")
            log.unlink()


def _counted(log: Path, directory: Path) -> int:
    here, count = str(directory), 0
    with log.open(errors="replace") as lines:
        for line in lines:
            call = _CALL.match(line)
            count += call is not None and call[1] in STORAGE_CALLS and here in line
    return count


def _elapsed_ns(place: Place, words: tuple[str, ...]) -> float:
    return timed(place, lambda: run(place, *words))


def timed(place: Place, work: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    work()
    return float(time.perf_counter_ns() - begun)


def run(place: Place, *words: str) -> str:
    done = subprocess.run(
        words,
        cwd=place.directory,
        env={**os.environ, **place.variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"bench-path: {words[0]} on {place.side}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def _rocksdb(report: Report, place: Place) -> None:
    common = (f"--num={RECORDS}", "--value_size=400", "--compression_type=none", f"--reads={RECORDS}")
    out = run(place, "db_bench", "--db=rocks", "--seed=1", *common, f"--benchmarks={','.join(DB_BENCHMARKS)}")
    found = dict(_DB_FIGURE.findall(out))
    for name in DB_BENCHMARKS:
        report.add(f"RocksDB {name}", place.side, float(found[name]) * 1000)
    run(place, "rm", "-r", "rocks")


def _start_ns(place: Place) -> float:
    """The mean processor time of many short programs: the clock on the wall tells how busy the machine is."""
    environment = {**os.environ, **place.variables}
    seconds = 0.0
    for _ in range(STARTS):
        process = os.posix_spawn("/bin/true", ["true"], environment)
        _, _, usage = os.wait4(process, 0)
        seconds += usage.ru_utime + usage.ru_stime
    return seconds / STARTS * 1e9
