"""The preload library where programs find it, with C libraries' sites, and their code with jumps in it.

One directory a tenant, whose files only we write: containers are shown it read-only. Sites are found once for
each build of a C library, named by its build id, and checked against memory by whoever uses them; the code is
used by programs that have loaded the very file that it was made of, as build id, size and time tell. A
program in a container can forge all three, so code goes as soon as another library of the same build comes.
"""

import fcntl
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

from polytropo.errors import PolytropoError
from polytropo.keeper import service_binary

LIBRARY = "libpolytropo_preload.so"
BESIDE_SANITIZERS = "beside-libasan.so"
"""A second name of the library's directory. AddressSanitizer ends programs whose first library is not its
own, which it knows by a part of the path. Ours steps aside for it, but has to be loaded to do so."""
_STAMP = f"{LIBRARY}.stamp"
_SITES_SUFFIX = ".sites"
_CODE_SUFFIX = ".code"
_SOURCE_SUFFIX = ".source"
_SITES_PROGRAM = "polytropo-sites"
_SITES_TIMEOUT_S = 20.0
_C_LIBRARY_MAX_BYTES = 64 << 20
_HEAD_BYTES = 4096
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3
_BUILD_ID_MAX_BYTES = 32


def library_source() -> Path:
    """The library as it was built or installed."""
    return Path(__file__).parent / "_bin" / LIBRARY


def stage_library(directory: Path) -> Path:
    """Puts the library of this version into the directory, if it is not there; the path to load it by.

    Raises PolytropoError, OSError.
    """
    source = library_source()
    library, stamp = directory / LIBRARY, directory / _STAMP
    with suppress(FileExistsError):
        (directory / BESIDE_SANITIZERS).symlink_to(".")
    named = directory / BESIDE_SANITIZERS / LIBRARY
    try:
        wanted = _stamp_of(source)
    except FileNotFoundError:
        raise PolytropoError(f"the preload library {source} is missing; run `make build`") from None
    with suppress(FileNotFoundError):
        if stamp.read_text() == wanted and library.exists():
            return named
    # What it can do decides which sites it wants.
    for suffix in (_SITES_SUFFIX, _CODE_SUFFIX, _SOURCE_SUFFIX):
        for found in directory.glob(f"*{suffix}"):
            found.unlink(missing_ok=True)
    _write(library, source.read_bytes(), 0o755)
    _write(stamp, wanted.encode(), 0o644)
    return named


def stage_sites(directory: Path, c_library: int) -> None:
    """Has the sites of a C library, open as the descriptor `c_library`, found and its code prepared, once.

    Without them the preload library looks for itself, at each start of a program.
    """
    try:
        status = os.fstat(c_library)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _C_LIBRARY_MAX_BYTES:
            return
        build_id = build_id_of(c_library)
    except (OSError, struct.error):
        return
    if build_id is None:
        return
    with suppress(OSError):
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            _stage_build(directory / build_id, c_library, status)
        finally:
            os.close(held)


def _stage_build(stem: Path, c_library: int, status: os.stat_result) -> None:
    source = stem.with_name(stem.name + _SOURCE_SUFFIX)
    # Nobody chooses the time of a change.
    identity = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    if stem.with_name(stem.name + _SITES_SUFFIX).exists():
        known, _, digest = source.read_text().partition("\n") if source.exists() else ("", "", "")
        if known != identity and digest != _digest_of(c_library):
            stem.with_name(stem.name + _CODE_SUFFIX).unlink(missing_ok=True)
        return
    _write(source, f"{identity}\n{_digest_of(c_library)}".encode(), 0o644)
    import subprocess

    tool = service_binary().with_name(_SITES_PROGRAM)
    tool = tool if tool.exists() else Path(__file__).parent / "_bin" / _SITES_PROGRAM
    with suppress(subprocess.SubprocessError):
        subprocess.run(
            [tool, stem.parent, f"/proc/self/fd/{c_library}"],
            pass_fds=[c_library],
            capture_output=True,
            timeout=_SITES_TIMEOUT_S,
            check=False,
        )


def _digest_of(library: int) -> str:
    import hashlib

    with Path(f"/proc/self/fd/{library}").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def build_id_of(library: int) -> str | None:
    """The build id of an x86-64 ELF file; None if it has none. Raises OSError, struct.error."""
    head = os.pread(library, _HEAD_BYTES, 0)
    if not head.startswith(b"\x7fELF\x02\x01"):
        return None
    table, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
    for index in range(min(count, _HEAD_BYTES // max(size, 1))):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", head, table + index * size)
        if kind == _PT_NOTE and offset < _C_LIBRARY_MAX_BYTES:
            notes = os.pread(library, min(length, _HEAD_BYTES), offset)
            if (found := _build_id_in(notes)) is not None:
                return found.hex()
    return None


def _build_id_in(notes: bytes) -> bytes | None:
    at = 0
    while at + 12 <= len(notes):
        name_length, length, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        bytes_at = name_at + (name_length + 3 & ~3)
        name, found = notes[name_at : name_at + name_length], notes[bytes_at : bytes_at + length]
        if kind == _NT_GNU_BUILD_ID and name == b"GNU\0":
            return found if 0 < length == len(found) <= _BUILD_ID_MAX_BYTES else None
        at = bytes_at + (length + 3 & ~3)
    return None


def _stamp_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _write(path: Path, content: bytes, mode: int) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.chmod(mode)
    unfinished.rename(path)
