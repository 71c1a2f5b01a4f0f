"""Chooses random operations and has the same done below two directories, by one actor or several."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ACTOR = Path(__file__).with_name("actor.py")
NAMES = ("a", "b", "c", "d", "\udcff\udcfe", "long" * 40)
XATTRS = ("user.one", "user.two")
# Not (-1, -1): the kernel does not pass it on to FUSE, so that setuid bits stay, as POSIX allows.
OWNERS = ((-1, 0), (-1, 1000), (0, -1), (1000, -1), (0, 0), (0, 1000), (1000, 0), (1000, 1000))
# Links may lead nowhere, but not to one file of the host for both sides, which `open` could even make.
TARGETS = (".", "./a", "/no/such/place", "x" * 900)
SLOTS = range(4)
LENGTHS = (0, 1, 100, 4095, 4096, 4097, 70_000, 300_000)


ON_OPEN_FILES = (
    *("open", "tmpfile", "link_open", "close", "pwrite", "write", "pread", "read_slot_here_and_there"),
    *("ftruncate", "fstat", "fsync", "fallocate", "seek_hole", "copy_range", "mmap_write", "lock", "unlock"),
)


# After which a file may have no name.
TAKE_NAMES = ("unlink", "rename")


class Side:
    """Some actor processes that share one directory."""

    def __init__(self, directory: Path, actors: int, variables: Mapping[str, str] | None = None) -> None:
        """The first half of the actors, or a lone one, gets `variables` in its environment."""
        self.directory = directory
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ACTOR), str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **(variables or {})} if number * 2 < actors else None,
            )
            for number in range(actors)
        ]

    def ask(self, actor: int, name: str, arguments: list[Any]) -> dict[str, Any]:
        process = self.processes[actor]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([name, arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise AssertionError(f"the actor in {self.directory} died in {name} {arguments}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Side:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


@dataclass
class Chooser:
    """Draws the next operation. Paths come from few names and two levels, so that they collide often."""

    random: random.Random
    paths: list[str] = field(default_factory=list)
    # Nothing stays open from one operation to the next.
    closed: bool = False

    def path(self) -> str:
        depth = self.random.choice((1, 1, 2, 2, 3))
        return "/".join(self.random.choice(NAMES) for _ in range(depth))

    def length(self) -> int:
        return self.random.choice(LENGTHS)

    def slot(self) -> int:
        return self.random.choice(SLOTS)

    def seed(self) -> int:
        return self.random.randrange(1 << 30)

    def flags(self) -> int:
        access = self.random.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY))
        extra = self.random.choice(
            (0, 0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND)
        )
        return access | extra

    def next(self) -> tuple[str, list[Any]]:
        r = self.random
        choices: list[tuple[int, str, list[Any]]] = [
            (6, "mkdir", [self.path(), r.choice((0o755, 0o700, 0o2775, 0o1777))]),
            (2, "rmdir", [self.path()]),
            (4, "unlink", [self.path()]),
            (6, "rename", [self.path(), self.path(), r.choice((0, 0, 0, 1, 2))]),
            (3, "link", [self.path(), self.path()]),
            (2, "symlink", [r.choice((self.path(), *TARGETS)), self.path()]),
            (1, "mkfifo", [self.path()]),
            (3, "listdir", [r.choice((".", self.path()))]),
            (2, "scandir", [r.choice((".", self.path()))]),
            (4, "stat", [self.path()]),
            (2, "stat_follow", [self.path()]),
            (2, "chmod", [self.path(), r.choice((0o644, 0o600, 0o4755, 0o2755, 0o000))]),
            (2, "chown", [self.path(), *r.choice(OWNERS)]),
            (2, "utime", [self.path(), r.randrange(1 << 60), r.randrange(1 << 60)]),
            (1, "access", [self.path(), r.choice((os.F_OK, os.R_OK, os.W_OK, os.X_OK))]),
            (2, "setxattr", [self.path(), r.choice(XATTRS), r.choice((0, 10, 900)), r.choice((0, 0, 1, 2))]),
            (1, "removexattr", [self.path(), r.choice(XATTRS)]),
            (1, "xattrs", [self.path()]),
            (4, "digest", [self.path()]),
            (2, "truncate", [self.path(), self.length()]),
            (3, "append", [self.path(), self.seed(), self.length()]),
            (5, "write_file", [self.path(), self.seed(), self.length()]),
            (6, "open", [self.slot(), self.path(), self.flags(), 0o644]),
            (1, "tmpfile", [self.slot(), r.choice((".", self.path()))]),
            (1, "link_open", [self.slot(), self.path()]),
            (2, "close", [self.slot()]),
            (5, "pwrite", [self.slot(), self.length(), self.seed(), self.length()]),
            (4, "write", [self.slot(), self.seed(), self.length()]),
            (5, "pread", [self.slot(), self.length(), self.length()]),
            (3, "read_here_and_there", [self.path(), self.seed()]),
            (3, "read_slot_here_and_there", [self.slot(), self.seed()]),
            (2, "ftruncate", [self.slot(), self.length()]),
            (3, "fstat", [self.slot()]),
            (1, "fsync", [self.slot()]),
            (2, "fallocate", [self.slot(), r.choice((0, 1, 3, 16)), self.length(), self.length()]),
            (1, "seek_hole", [self.slot()]),
            (2, "copy_range", [0, 1, self.length(), self.length()]),
            (2, "mmap_write", [self.slot(), self.length(), self.seed(), r.choice((1, 5000))]),
            (2, "lock", [self.slot(), r.choice(("flock", "posix")), r.random() < 0.5, 0, r.choice((0, 10))]),
            (1, "unlock", [self.slot(), r.choice(("flock", "posix"))]),
        ]
        if self.closed:
            choices = [choice for choice in choices if choice[1] not in ON_OPEN_FILES]
        weights = [weight for weight, _, _ in choices]
        _, name, arguments = r.choices(choices, weights)[0]
        return name, arguments


def compare(
    mount: Path,
    plain: Path,
    *,
    seed: int,
    steps: int,
    actors: int = 1,
    check_every: int = 50,
    variables: Mapping[str, str] | None = None,
    closed: bool = False,
    named: bool = False,
) -> int:
    """Does ``steps`` operations below both directories and raises AssertionError at the first difference.

    With ``closed`` nothing stays open from one operation to the next, with ``named`` no file without a name.
    Returns how many of them succeeded, so that a caller can see that the run was not all refusals.
    """
    dice = random.Random(seed)
    chooser = Chooser(dice, closed=closed)
    history: list[str] = []
    succeeded = 0
    with Side(mount, actors, variables) as left, Side(plain, actors) as right:
        for step in range(steps):
            name, arguments = chooser.next()
            actor = dice.randrange(actors)
            if named and name in TAKE_NAMES:
                for each in range(actors):
                    _check(left.ask(each, "close_all", []), right.ask(each, "close_all", []), seed, history)
            if named and name == "tmpfile":
                continue
            history.append(f"{step}: actor {actor} {name} {arguments}")
            got, wanted = left.ask(actor, name, arguments), right.ask(actor, name, arguments)
            _check(got, wanted, seed, history)
            succeeded += "ok" in got
            if step % check_every == check_every - 1:
                _check(left.ask(0, "tree", []), right.ask(0, "tree", []), seed, history)
        _check(left.ask(0, "tree", []), right.ask(0, "tree", []), seed, history)
    return succeeded


def _check(got: dict[str, Any], wanted: dict[str, Any], seed: int, history: list[str]) -> None:
    if got == wanted:
        return
    if isinstance(got.get("ok"), dict) and isinstance(wanted.get("ok"), dict):
        keys = got["ok"].keys() | wanted["ok"].keys()
        differing = [k for k in sorted(keys) if got["ok"].get(k) != wanted["ok"].get(k)]
        got = {k: got["ok"].get(k) for k in differing[:5]}
        wanted = {k: wanted["ok"].get(k) for k in differing[:5]}
    last = "\n".join(history[-40:])
    raise AssertionError(f"seed {seed}: the mount said {got}\nbut ext4 said {wanted}\nafter\n{last}")
