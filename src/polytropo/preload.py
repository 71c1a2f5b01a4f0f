"""The preload library, which lets programs read through shared memory: whom it is for, how they get it."""

import os
import shutil
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from polytropo.errors import PolytropoError
from polytropo.preload_files import stage_library, stage_sites
from polytropo.state import State
from polytropo.tenants import run_dir, tenant_dir

_C_LIBRARIES = ("/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/lib/ld-musl-x86_64.so.1")
_INTERPRETERS_MAX = 4
_HEAD_BYTES = 256
_SEGMENTS_MAX = 64
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
    # Where it can be read after the program gave up its rights: without a service, but in silence.
    library = _stage(tenant_dir(state, tenant) / "preload")
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
            with program.open("rb") as file:
                head = file.read(_HEAD_BYTES)
                if not head.startswith(b"#!"):
                    descriptor = file.fileno()
                    return _why_not_by_rights(descriptor) or _why_not_by_format(descriptor, head)
        except OSError as error:
            return f"it cannot be read: {error.strerror}"
        words = head[2:].split(b"\n", 1)[0].split()
        if not words:
            return None
        program = Path(os.fsdecode(words[0]))
        if program.name == "env" and len(words) > 1:
            program = Path(shutil.which(os.fsdecode(words[1])) or program)
    return None


def _why_not_by_rights(descriptor: int) -> str | None:
    more = os.fstat(descriptor).st_mode & 0o6000 != 0
    with suppress(OSError):
        os.getxattr(descriptor, "security.capability")
        more = True
    return "it runs with rights that its caller does not have" if more else None


def _why_not_by_format(descriptor: int, head: bytes) -> str | None:
    if not head.startswith(b"\x7fELF"):
        return "it is no ELF program"
    if head[4] != 2 or len(head) < 64 or struct.unpack_from("<H", head, 18)[0] != _MACHINE_X86_64:
        return "it is for another architecture"
    table, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
    dynamic = False
    try:
        for at in range(table, table + size * min(count, _SEGMENTS_MAX), size or 1):
            kind, _, offset, _, _, length = struct.unpack("<IIQQQQ", os.pread(descriptor, 40, at))
            dynamic |= kind == _PT_INTERP
            if kind == _PT_NOTE and length and os.pread(descriptor, 4, offset + 12) == b"Go\0\0":
                return "it is written in Go, whose programs call the kernel themselves"
    except (struct.error, OSError, OverflowError):
        return "it is no whole ELF program"
    return None if dynamic else "it is linked statically"


def _stage(directory: Path) -> Path:
    """The library with the sites of this machine's C libraries beside it."""
    directory.mkdir(mode=0o755, exist_ok=True)
    library = stage_library(directory)
    for path in _C_LIBRARIES:
        try:
            c_library = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            stage_sites(directory, c_library)
        finally:
            os.close(c_library)
    return library


def _mountpoint(directory: Path) -> Path:
    """The mount that a directory lies on."""
    place = directory
    while not place.is_mount():
        place = place.parent
    return place
