"""The preload library, which lets programs read through shared memory: whom it is for, how they get it."""

import mmap
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from polytropo.errors import PolytropoError
from polytropo.keeper import service_binary
from polytropo.state import State
from polytropo.tenants import run_dir

LIBRARY = "libpolytropo_preload.so"
_SITES = "polytropo-sites"
_SITES_TIMEOUT_S = 20.0
_C_LIBRARIES = ("/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/lib/ld-musl-x86_64.so.1")
_INTERPRETERS_MAX = 4
_MACHINE_X86_64 = 62
_PT_INTERP, _PT_NOTE = 3, 4

LEAVE_ALONE: Mapping[str, str] = {
    "valgrind": "it runs the program on a processor of its own and has descriptors that nobody must see",
    "rr": "it rewrites the C library's system calls itself, and a replay has no service to ask",
    "qemu-x86_64": "it runs the program on a processor of its own, where its C library is only data",
    "gdb": "a debugger reads programs in a language of its own; what it starts should be what was written",
    "strace": "it is asked for the system calls that a program makes, not for those that are left",
    "ltrace": "it puts breakpoints where we put jumps",
    "perf": "it looks names up by address, and trampolines have none",
}
"""Programs that are started without the library, and why."""


def environment_on(state: State, tenant: str, directory: Path, program: str) -> dict[str, str]:
    """The variables that make `program` use the tenant's service; a PolytropoError says why it should not."""
    path = shutil.which(program)
    if path is None:
        return {}
    if reason := why_not(Path(path)):
        raise PolytropoError(f"{program} is started without the preload library: {reason}")
    library = _stage(run_dir(state, tenant) / "preload")
    others = os.environ.get("LD_PRELOAD")
    return {
        "LD_PRELOAD": f"{library}:{others}" if others else str(library),
        "POLYTROPO_CHANNEL": str(run_dir(state, tenant) / "channel/channel.sock"),
        "POLYTROPO_MOUNT": str(_mountpoint(directory)),
    }


def why_not(program: Path) -> str | None:
    """Why the library is of no use to a program, or would harm it; None if neither."""
    for _ in range(_INTERPRETERS_MAX):
        if reason := LEAVE_ALONE.get(program.name):
            return reason
        try:
            status = program.stat()
            with program.open("rb") as file:
                head = file.read(256)
                if not head.startswith(b"#!"):
                    return _why_not_by_rights(program, status.st_mode) or _why_not_by_format(
                        file.fileno(), head
                    )
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        words = head[2:].split(b"\n", 1)[0].split()
        if not words:
            return None
        program = Path(os.fsdecode(words[0]))
        if program.name == "env" and len(words) > 1:
            program = Path(shutil.which(os.fsdecode(words[1])) or program)
    return None


def _why_not_by_rights(program: Path, mode: int) -> str | None:
    if mode & 0o6000:
        return "it runs with rights that its caller does not have"
    with suppress(OSError):
        os.getxattr(program, "security.capability")
        return "it runs with rights that its caller does not have"
    return None


def _why_not_by_format(descriptor: int, head: bytes) -> str | None:
    if not head.startswith(b"\x7fELF"):
        return "it is no ELF program"
    if head[4] != 2 or len(head) < 64 or struct.unpack_from("<H", head, 18)[0] != _MACHINE_X86_64:
        return "it is for another architecture"
    table, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
    dynamic = False
    try:
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as program:
            for at in range(table, table + size * min(count, 64), size or 1):
                kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", program, at)
                dynamic |= kind == _PT_INTERP
                if kind == _PT_NOTE and program[offset + 12 : offset + 16] == b"Go\0\0" and length:
                    return "it is written in Go, whose programs call the kernel themselves"
    except (struct.error, ValueError, OSError):
        return "it is no whole ELF program"
    return None if dynamic else "it is linked statically"


def _stage(directory: Path) -> Path:
    """The library with the sites of this machine's C libraries beside it, made if they are not there."""
    binaries = Path(__file__).parent / "_bin"
    source = binaries / LIBRARY
    if not source.is_file():
        raise PolytropoError(f"the preload library {source} is missing; run `make build`")
    directory.mkdir(mode=0o755, exist_ok=True)
    library = directory / LIBRARY
    if _stamp(source) != _stamped(library):
        _replace(source, library)
        _set_stamp(library, _stamp(source))
    for name in _C_LIBRARIES:
        path = Path(name)
        mark = directory / path.name
        if not path.exists() or _stamp(path) == _stamped(mark):
            continue
        # Without them the library looks for itself, at each start of a program.
        tool = service_binary().with_name(_SITES)
        tool = tool if tool.exists() else binaries / _SITES
        subprocess.run([tool, directory, path], capture_output=True, timeout=_SITES_TIMEOUT_S, check=False)
        _set_stamp(mark, _stamp(path))
    return library


def _replace(source: Path, target: Path) -> None:
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, unfinished)
    unfinished.chmod(0o755)
    unfinished.rename(target)


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _stamped(path: Path) -> str | None:
    try:
        return path.with_name(f"{path.name}.stamp").read_text()
    except FileNotFoundError:
        return None


def _set_stamp(path: Path, stamp: str) -> None:
    unfinished = path.with_name(f"{path.name}.stamp.{os.getpid()}")
    unfinished.write_text(stamp)
    unfinished.rename(path.with_name(f"{path.name}.stamp"))


def _mountpoint(directory: Path) -> Path:
    """The mount that a directory lies on."""
    place = directory
    while not place.is_mount():
        place = place.parent
    return place
