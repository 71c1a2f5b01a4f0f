"""The private path of a container: preload library, sites of the image's C libraries, the service's socket.

Shown read-only. Sites are kept by image: a C library can claim any build id, and what was found in one of a
hostile image must not be believed of another's. How programs come to load the library is chosen by the
image: glibc's loader reads /etc/ld.so.preload, which also reaches programs whose environment was cleaned and
is no trouble after chroot(2); musl's knows the environment only. What neither loads (static programs, foreign
ones) uses FUSE, and so does everything when the library finds a reason to step aside.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from polytropo.containers.records import Container, Files
from polytropo.containers.spec import Bind
from polytropo.errors import PolytropoError, storage_errors
from polytropo.preload_mode import VARIABLE
from polytropo.rooted import open_in_root, read_in_root
from polytropo.state import State
from polytropo.tenants import run_dir

PLACE = "/run/.polytropo"
LIBRARY_PLACE = f"{PLACE}/lib"
_OURS = f"{PLACE}/".encode()
_DIGEST_DIGITS = 32
_LISTED = "/etc/ld.so.preload"
_LISTED_MAX_BYTES = 1 << 16
MOUNTED = (PLACE.removeprefix("/").encode(), _LISTED.removeprefix("/").encode())
"""Where something is mounted that is no part of the container, relative to its root."""

_GLIBC_LOADER = "/lib64/ld-linux-x86-64.so.2"
_MUSL = "/lib/ld-musl-x86_64.so.1"
_FOREIGN_LOADER = "/lib/ld-linux.so.2"
_GLIBC = ("/lib/x86_64-linux-gnu/libc.so.6", "/lib64/libc.so.6", "/usr/lib/libc.so.6", "/lib/libc.so.6")


def can_load(layers: Sequence[Path]) -> bool:
    """Whether programs of an image could load the library: if not, its containers are left to FUSE whole.

    Each layer is looked at by itself, so that nothing has to be mounted.
    """
    found = {path for path in (_GLIBC_LOADER, _MUSL, _FOREIGN_LOADER) if _in_a_layer(layers, path)}
    return _MUSL in found or (_GLIBC_LOADER in found and _FOREIGN_LOADER not in found)


def _in_a_layer(layers: Sequence[Path], path: str) -> bool:
    for layer in layers:
        try:
            root = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            # Where /lib is a link to /usr/lib, another layer than the link's may have the file.
            if _has(root, path) or _has(root, f"/usr{path}"):
                return True
        finally:
            os.close(root)
    return False


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
    from polytropo.preload_files import stage_library, stage_sites

    channel = run_dir(state, container.tenant) / "channel"
    digest = container.image_digest.removeprefix("sha256:")[:_DIGEST_DIGITS]
    directory = run_dir(state, container.tenant) / "preload" / digest
    with storage_errors("prepare the preload library", directory):
        (channel / "lib").mkdir(mode=0o755, exist_ok=True)
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        stage_library(directory)
        for descriptor in c_libraries:
            stage_sites(directory, descriptor)
        binds = [Bind(channel, PLACE, True), Bind(directory, LIBRARY_PLACE, True)]
        if listed:
            path = files.etc / "ld.so.preload"
            path.write_bytes(f"{_shown_library()}\n".encode() + _others(root))
            path.chmod(0o644)
            binds.append(Bind(path, _LISTED, True))
    variables = {} if listed else _variables(container.environment)
    return PrivatePath(tuple(binds), variables | _patience(container, container.environment))


def environment(container: Container, root: int, given: Mapping[str, str]) -> dict[str, str]:
    """The variables by which one more program in a container that runs comes to the library."""
    if not container.preload or not _has(root, _shown_library()):
        return {}
    variables = {} if _others(root).startswith(_OURS) else _variables(given)
    return variables | _patience(container, given)


def _patience(container: Container, given: Mapping[str, str]) -> dict[str, str]:
    """Has programs keep to FUSE until shared memory would have paid, unless they are told otherwise."""
    return {VARIABLE: "auto"} if container.patient and VARIABLE not in given else {}


def _variables(given: Mapping[str, str]) -> dict[str, str]:
    others = given.get("LD_PRELOAD")
    library = _shown_library()
    return {"LD_PRELOAD": f"{library}:{others}" if others else library}


def _shown_library() -> str:
    from polytropo.preload_files import BESIDE_SANITIZERS, LIBRARY

    return f"{LIBRARY_PLACE}/{BESIDE_SANITIZERS}/{LIBRARY}"


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
