"""The private path of a container: preload library, sites of the image's C libraries, the service's socket.

All in one directory of the tenant, shown read-only. How programs come to load the library is chosen by the
image: glibc's loader reads /etc/ld.so.preload, which also reaches programs whose environment was cleaned and
is no trouble after chroot(2); musl's knows the environment only. What neither loads (static programs, foreign
ones) uses FUSE, and so does everything when the library finds a reason to step aside.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

import msgspec

from polytropo.containers.records import Container, Files
from polytropo.containers.rooted import open_in_root, read_in_root
from polytropo.containers.spec import Bind
from polytropo.errors import PolytropoError, storage_errors
from polytropo.state import State
from polytropo.tenants import run_dir

PLACE = "/run/.polytropo"
_OURS = f"{PLACE}/".encode()
_LISTED = "/etc/ld.so.preload"
_LISTED_MAX_BYTES = 1 << 16
_GLIBC_LOADER = "/lib64/ld-linux-x86-64.so.2"
_MUSL = "/lib/ld-musl-x86_64.so.1"
_FOREIGN_LOADER = "/lib/ld-linux.so.2"
_GLIBC = ("/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/usr/lib/libc.so.6", "/lib/libc.so.6")


class PrivatePath(msgspec.Struct, frozen=True):
    """What a container needs beside its root; nothing where its programs would not use it."""

    binds: Sequence[Bind] = ()
    environment: Mapping[str, str] = {}


def prepare(state: State, container: Container, files: Files, root: int) -> PrivatePath:
    """Makes what the container is to be shown; `root` is its root directory."""
    if not container.preload:
        return PrivatePath()
    glibc = None if _has(root, _FOREIGN_LOADER) or not _has(root, _GLIBC_LOADER) else _first(root, _GLIBC)
    musl = _first(root, (_MUSL,))
    found = [descriptor for descriptor in (glibc, musl) if descriptor is not None]
    try:
        if not found:
            return PrivatePath()
        return _prepare(state, container, files, root, found, glibc is not None)
    except PolytropoError:
        if "POLYTROPO_DEBUG" in os.environ:
            raise
        return PrivatePath()  # FUSE does it all
    finally:
        for descriptor in found:
            os.close(descriptor)


def _prepare(
    state: State, container: Container, files: Files, root: int, c_libraries: list[int], listed: bool
) -> PrivatePath:
    from polytropo.preload_files import LIBRARY, stage_library, stage_sites

    directory = run_dir(state, container.tenant) / "channel"
    with storage_errors("prepare the preload library", directory):
        stage_library(directory)
        for descriptor in c_libraries:
            stage_sites(directory, descriptor)
        binds = [Bind(directory, PLACE, True)]
        if listed:
            path = files.etc / "ld.so.preload"
            path.write_bytes(_OURS + f"{LIBRARY}\n".encode() + _others(root))
            path.chmod(0o644)
            binds.append(Bind(path, _LISTED, True))
    return PrivatePath(tuple(binds), {} if listed else _variables(container.environment))


def environment(container: Container, root: int, given: Mapping[str, str]) -> dict[str, str]:
    """The variables by which one more program in a container that runs comes to the library."""
    from polytropo.preload_files import LIBRARY

    if not container.preload or not _has(root, f"{PLACE}/{LIBRARY}") or _others(root).startswith(_OURS):
        return {}
    return _variables(given)


def _variables(given: Mapping[str, str]) -> dict[str, str]:
    from polytropo.preload_files import LIBRARY

    others = given.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{PLACE}/{LIBRARY}:{others}" if others else f"{PLACE}/{LIBRARY}"}


def _others(root: int) -> bytes:
    """What the image itself has every program load."""
    with suppress(OSError, ValueError):
        return read_in_root(root, _LISTED, _LISTED_MAX_BYTES)
    return b""


def _first(root: int, paths: tuple[str, ...]) -> int | None:
    for path in paths:
        with suppress(OSError):
            return open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return None


def _has(root: int, path: str) -> bool:
    with suppress(OSError):
        os.close(open_in_root(root, path, os.O_PATH))
        return True
    return False
