"""Which blocks of which files a program reads, as strace(1) sees it.

That is what windows see: reads by system call, those too that the kernel would have answered from its cache.
What is mapped counts once, in order, when it is mapped.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

BLOCK_BYTES = 64 << 10
MAP_MAX_BYTES = 64 << 20
CALLS = (
    "openat,open,creat,read,pread64,readv,preadv,lseek,write,pwrite64,writev,dup,dup2,dup3,close,mmap,"
    "clone,clone3,fork,vfork,fcntl"
)
LINE = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?")
UNFINISHED = re.compile(r"^(\d+) +(\w+)\((.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")
DESCRIPTOR = re.compile(r"^(\d+)(?:<([^>]*)>)?")
ELSEWHERE = ("/proc/", "/sys/", "/dev/", "/run/")

Access = tuple[str, int]


@dataclass
class _Open:
    path: str
    offset: int = 0


@dataclass
class _Replay:
    """Open files and their offsets, process by process."""

    accesses: list[Access] = field(default_factory=list)
    tables: dict[int, dict[int, _Open]] = field(default_factory=dict)
    halves: dict[int, str] = field(default_factory=dict)

    def line(self, line: str) -> None:
        if found := UNFINISHED.match(line):
            self.halves[int(found[1])] = f"{found[1]} {found[2]}({found[3]}"
            return
        if found := RESUMED.match(line):
            line = self.halves.pop(int(found[1]), "") + found[3]
        if found := LINE.match(line):
            pid, call, arguments, result = int(found[1]), found[2], found[3], int(found[4])
            if result >= 0:
                self._call(pid, call, arguments, result, found[5])

    def _call(self, pid: int, call: str, arguments: str, result: int, opened: str | None) -> None:
        table = self.tables.setdefault(pid, {})
        if call in ("openat", "open", "creat"):
            table[result] = _Open(opened or "")
        elif call in ("clone", "clone3", "fork", "vfork"):
            self.tables[result] = table if "CLONE_FILES" in arguments else dict(table)
        elif call == "mmap":
            self._map(arguments)
        elif found := DESCRIPTOR.match(arguments):
            number, path = int(found[1]), found[2] or ""
            file = table.setdefault(number, _Open(path))
            if file.path != path:
                file = table[number] = _Open(path)
            self._file(table, file, (call, number, arguments), result)

    def _file(self, table: dict[int, _Open], file: _Open, request: tuple[str, int, str], result: int) -> None:
        call, number, arguments = request
        if call in ("read", "readv"):
            self._touch(file.path, file.offset, result)
            file.offset += result
        elif call in ("pread64", "preadv"):
            self._touch(file.path, int(arguments.rsplit(",", 1)[1]), result)
        elif call in ("write", "writev"):
            file.offset += result
        elif call == "lseek":
            file.offset = result
        elif call.startswith("dup") or (call == "fcntl" and "F_DUPFD" in arguments):
            table[result] = file
        elif call == "close":
            table.pop(number, None)

    def _map(self, arguments: str) -> None:
        parts = [part.strip() for part in arguments.split(",")]
        if len(parts) == 6 and (found := DESCRIPTOR.match(parts[4])) and found[2]:
            self._touch(found[2], int(parts[5], 0), min(int(parts[1], 0), MAP_MAX_BYTES))

    def _touch(self, path: str, offset: int, count: int) -> None:
        if count <= 0 or not path.startswith("/") or path.startswith(ELSEWHERE):
            return
        for block in range(offset // BLOCK_BYTES, (offset + count - 1) // BLOCK_BYTES + 1):
            # A block that is read piece by piece without another in between is one use.
            if not self.accesses or self.accesses[-1] != (path, block):
                self.accesses.append((path, block))


def record(command: list[str], directory: Path) -> list[Access]:
    """Runs a program and tells the blocks that it, and what it started, has read."""
    with tempfile.NamedTemporaryFile(prefix="bench-cache-", suffix=".strace") as log:
        strace = ["strace", "-f", "-q", "-y", "-s", "0", "-e", f"trace={CALLS}", "-o", log.name]
        subprocess.run([*strace, *command], cwd=directory, stdout=subprocess.DEVNULL, check=True, timeout=300)
        replay = _Replay()
        for line in Path(log.name).read_text(errors="replace").splitlines():
            replay.line(line)
        return replay.accesses
