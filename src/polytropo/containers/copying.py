"""`cp`: files between the host and a container, as entries of a tar archive.

Both ends are given as a root directory and a path in it. What the container holds is hostile: links in it
are resolved inside of its root, and entries are made below the destination whatever they are named.
"""

import errno
import os
import posixpath
import shutil
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from polytropo.errors import PolytropoError
from polytropo.rooted import open_in_root

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_COPY_BYTES = 1 << 20
_PERMISSIONS = 0o777
_SET_ID_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX

Entry = tuple[tarfile.TarInfo, IO[bytes] | None]


@dataclass(frozen=True)
class Place:
    """`path` as it looks from the directory `root`; `shown` is how a person wrote it."""

    root: int
    path: str
    shown: str

    @property
    def means_contents(self) -> bool:
        """Whether a directory's contents are meant and not the directory."""
        return posixpath.basename(self.path) == "."


def copy(source: Place, target: Place, *, archive: bool) -> None:
    """Copies a file or a directory tree, named as `cp -r` does it. Raises PolytropoError.

    With `archive` owners and set-id bits are kept; otherwise files belong to whoever makes them.
    """
    directory, name = _destination(source, target)
    try:
        put(directory, entries(source, name), archive=archive)
    finally:
        os.close(directory)


def pack(source: Place, stream: IO[bytes]) -> None:
    """Writes a tar archive of a file or a directory tree. Raises PolytropoError."""
    name = "." if source.means_contents else posixpath.basename(posixpath.normpath(source.path))
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for info, content in entries(source, name):
            archive.addfile(info, content)


def unpack(stream: IO[bytes], target: Place, *, archive: bool) -> None:
    """Unpacks a tar archive into a directory. Raises PolytropoError."""
    try:
        directory = open_in_root(target.root, target.path, _DIRECTORY)
    except OSError as error:
        raise _failure("unpack into", target.shown, error) from error
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as packed:
            put(directory, _unpacked(packed), archive=archive)
    except tarfile.TarError as error:
        raise PolytropoError(f"the archive on standard input is damaged: {error}") from error
    finally:
        os.close(directory)


def entries(source: Place, name: str) -> Iterator[Entry]:
    """What lies at `source`, itself first, as tar entries below `name`. Raises PolytropoError."""
    seen: dict[tuple[int, int], str] = {}
    waiting = [("", name)]
    while waiting:
        inside, entry_name = waiting.pop()
        path = posixpath.join(source.path, inside) if inside else source.path
        try:
            # A link that is named itself is copied as a link, unless a slash at its end asks for its target.
            descriptor = open_in_root(source.root, path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            if inside:  # removed meanwhile
                continue
            raise PolytropoError(f"there is no {source.shown}") from None
        except OSError as error:
            raise _failure("copy", _shown(source, inside), error) from error
        try:
            status = os.fstat(descriptor)
            info = _info(descriptor, status, entry_name, seen)
            if info is None:
                raise PolytropoError(f"{_shown(source, inside)} is a device or socket, which is not copied")
            if info.isreg():
                with os.fdopen(_reopened(descriptor, os.O_RDONLY | os.O_NOATIME), "rb") as content:
                    yield info, content
            else:
                yield info, None
            if info.isdir():
                below = sorted(_names(descriptor), reverse=True)
                waiting += [
                    (posixpath.join(inside, each), posixpath.join(entry_name, each)) for each in below
                ]
        except OSError as error:
            raise _failure("copy", _shown(source, inside), error) from error
        finally:
            os.close(descriptor)


def put(directory: int, found: Iterable[Entry], *, archive: bool) -> None:
    """Makes entries below `directory`, in place of files of the same names. Raises PolytropoError."""
    times: list[tuple[str, float]] = []
    for info, content in found:
        name = _inner(info.name)
        try:
            _put_one(directory, name, info, content, archive)
        except OSError as error:
            raise _failure("write", info.name, error) from error
        if info.isdir():
            times.append((name, info.mtime))
    for name, mtime in reversed(times):
        with suppress(OSError):  # replaced meanwhile
            descriptor = open_in_root(directory, name, _DIRECTORY)
            try:
                os.utime(descriptor, (mtime, mtime))
            finally:
                os.close(descriptor)


def _unpacked(packed: tarfile.TarFile) -> Iterator[Entry]:
    for info in packed:
        yield info, packed.extractfile(info) if info.isreg() else None


def _put_one(root: int, name: str, info: tarfile.TarInfo, content: IO[bytes] | None, archive: bool) -> None:
    if name == ".":
        return
    parent_name, _, last = name.rpartition("/")
    parent = _open_parent(root, parent_name)
    try:
        if not info.isdir():
            _make_room(parent, last)
        mode = info.mode & (_PERMISSIONS | (_SET_ID_BITS if archive else 0))
        if info.isdir():
            with suppress(FileExistsError):
                os.mkdir(last, 0o700, dir_fd=parent)
            descriptor = os.open(last, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        elif info.isreg():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(last, flags, 0o600, dir_fd=parent)
        elif info.isfifo():
            os.mkfifo(last, 0o600, dir_fd=parent)
            descriptor = os.open(
                last, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent
            )
        elif info.issym():
            os.symlink(info.linkname, last, dir_fd=parent)
            if archive:
                os.chown(last, info.uid, info.gid, dir_fd=parent, follow_symlinks=False)
            return
        elif info.islnk():
            _link(root, _inner(info.linkname), parent, last)
            return
        else:
            raise PolytropoError(f"{info.name} is a device, which is not copied")
        _finish(descriptor, info, content, mode, archive)
    finally:
        os.close(parent)


def _finish(
    descriptor: int, info: tarfile.TarInfo, content: IO[bytes] | None, mode: int, archive: bool
) -> None:
    """Fills a new inode and sets what belongs to it; closes the descriptor."""
    try:
        if info.isreg() and content is not None:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                shutil.copyfileobj(content, file, _COPY_BYTES)
        if archive:
            os.fchown(descriptor, info.uid, info.gid)
        os.fchmod(descriptor, mode)
        if not info.isdir():
            os.utime(descriptor, (info.mtime, info.mtime))
    finally:
        os.close(descriptor)


def _destination(source: Place, target: Place) -> tuple[int, str]:
    """The directory to make entries in and the name of the first one there."""
    wants_directory = target.path.endswith("/") or target.means_contents
    try:
        directory = open_in_root(target.root, target.path, _DIRECTORY)
    except FileNotFoundError:
        if wants_directory and not _is_directory(source):
            raise PolytropoError(f"there is no directory {target.shown}") from None
    except NotADirectoryError:
        if wants_directory or _is_directory(source):
            raise PolytropoError(f"{target.shown} is no directory") from None
    except OSError as error:
        raise _failure("copy to", target.shown, error) from error
    else:
        name = "." if source.means_contents else posixpath.basename(posixpath.normpath(source.path))
        return directory, name
    parent, name = posixpath.split(posixpath.normpath(target.path))
    try:
        return open_in_root(target.root, parent or ".", _DIRECTORY), name
    except OSError as error:
        raise _failure("copy to", target.shown, error) from error


def _is_directory(place: Place) -> bool:
    try:
        os.close(open_in_root(place.root, place.path, _DIRECTORY | os.O_NOFOLLOW))
    except OSError:
        return False
    return True


def _info(
    descriptor: int, status: os.stat_result, name: str, seen: dict[tuple[int, int], str]
) -> tarfile.TarInfo | None:
    info = tarfile.TarInfo(name)
    info.mode, info.mtime = stat.S_IMODE(status.st_mode), status.st_mtime
    info.uid, info.gid = status.st_uid, status.st_gid
    kind = stat.S_IFMT(status.st_mode)
    inode = (status.st_dev, status.st_ino)
    if kind == stat.S_IFDIR:
        info.type = tarfile.DIRTYPE
    elif status.st_nlink > 1 and inode in seen:
        info.type, info.linkname = tarfile.LNKTYPE, seen[inode]
    elif kind == stat.S_IFREG:
        info.type, info.size = tarfile.REGTYPE, status.st_size
    elif kind == stat.S_IFLNK:
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=descriptor)
    elif kind == stat.S_IFIFO:
        info.type = tarfile.FIFOTYPE
    else:
        return None
    if kind != stat.S_IFDIR and status.st_nlink > 1:
        seen.setdefault(inode, name)
    return info


def _names(descriptor: int) -> list[str]:
    with os.scandir(f"/proc/self/fd/{descriptor}") as found:
        return [entry.name for entry in found]


def _reopened(descriptor: int, flags: int) -> int:
    """Opens the very inode of an O_PATH descriptor."""
    path = f"/proc/self/fd/{descriptor}"
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except PermissionError:  # O_NOATIME is for owners only
        return os.open(path, (flags & ~os.O_NOATIME) | os.O_CLOEXEC)


def _inner(name: str) -> str:
    """An entry's name as a path below the destination. Raises PolytropoError for one that leaves it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PolytropoError(f"the archive's entry {name!a} leads out of the destination; it is refused")
    return "/".join(parts) or "."


def _open_parent(root: int, name: str) -> int:
    """The directory `name` below `root`, made if it is missing."""
    try:
        return open_in_root(root, name, _DIRECTORY)
    except FileNotFoundError:
        parent_name, _, last = name.rpartition("/")
        parent = _open_parent(root, parent_name)
        try:
            os.mkdir(last, 0o755, dir_fd=parent)
        finally:
            os.close(parent)
        return open_in_root(root, name, _DIRECTORY)


def _make_room(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return


def _link(root: int, target: str, parent: int, name: str) -> None:
    descriptor = open_in_root(root, target, os.O_PATH | os.O_NOFOLLOW)
    try:
        os.link(f"/proc/self/fd/{descriptor}", name, dst_dir_fd=parent, follow_symlinks=True)
    finally:
        os.close(descriptor)


def _shown(source: Place, inside: str) -> str:
    return posixpath.join(source.shown, inside) if inside else source.shown


def _failure(action: str, shown: str, error: OSError) -> PolytropoError:
    reason = os.strerror(error.errno or errno.EIO)
    return PolytropoError(f"cannot {action} {shown}: {reason}")
