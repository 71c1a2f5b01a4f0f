"""Files of a mount as an fsspec filesystem, so that pandas, dask, zarr and others read them without the
kernel.

    import fsspec

    fs = fsspec.filesystem("polytropo", mountpoint="/data")
    with fs.open("/prices.parquet") as file:
        ...

Paths begin at the mount. Needs the package `fsspec` (`pip install polytropo[fsspec]`).
"""

import datetime
import errno
import io
import os
import stat
from contextlib import suppress
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.utils import stringify_path

from polytropo.fs import Files

CONTAINER_SOCKET = "/run/.polytropo/channel.sock"
_COPY_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 17
_FIELDS = ("mode", "uid", "gid", "mtime", "ino", "nlink")


class PolytropoFileSystem(AbstractFileSystem):  # type: ignore[misc] # fsspec has no types
    """The files of one mount.

    `mountpoint`: where it is mounted. `socket`: its service's (`channel/channel.sock` in the tenant's run
    directory). `auto_mkdir`: make missing parents of what is written. Raises `polytropo.fs.NoChannel` where
    the
    service gives this process no channel.
    """

    protocol = "polytropo"
    root_marker = "/"

    def __init__(
        self, mountpoint: str, socket: str = CONTAINER_SOCKET, auto_mkdir: bool = False, **options: Any
    ) -> None:
        super().__init__(mountpoint=mountpoint, socket=socket, auto_mkdir=auto_mkdir, **options)
        self.auto_mkdir = auto_mkdir
        self.files = Files(mountpoint, socket)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = stringify_path(path)
        for prefix in ("polytropo://", "polytropo:"):
            text = text.removeprefix(prefix)
        return "/" + "/".join(part for part in text.split("/") if part not in ("", "."))

    @property
    def fsid(self) -> str:
        return f"polytropo:{self.files.mountpoint}"

    def info(self, path: str, **_options: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        found = self.files.stat(name, follow_symlinks=False)
        link = stat.S_ISLNK(found.st_mode)
        if link:
            # Of a link that leads nowhere, the link's own.
            with suppress(FileNotFoundError):
                found = self.files.stat(name)
        told: dict[str, Any] = {
            "name": name,
            "size": found.st_size,
            "type": _type(found.st_mode),
            "created": found.st_ctime,
            "islink": link,
        }
        told |= {field: getattr(found, f"st_{field}") for field in _FIELDS}
        if link:
            told["destination"] = self.files.readlink(name)
        return told

    def ls(self, path: str, detail: bool = True, **_options: Any) -> list[Any]:
        name = self._strip_protocol(path)
        told = self.info(name)
        if told["type"] != "directory":
            return [told if detail else name]
        names = [f"{name.rstrip('/')}/{entry}" for entry in self.files.listdir(name)]
        if not detail:
            return names
        found = []
        for entry in names:
            with suppress(FileNotFoundError):  # gone since it was listed
                found.append(self.info(entry))
        return found

    def exists(self, path: str, **_options: Any) -> bool:
        return self.files.exists(self._strip_protocol(path))

    def lexists(self, path: str, **_options: Any) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            self.files.stat(self._strip_protocol(path), follow_symlinks=False)
            return True
        return False

    def islink(self, path: str) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            found = self.files.stat(self._strip_protocol(path), follow_symlinks=False)
            return stat.S_ISLNK(found.st_mode)
        return False

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **_options: Any) -> Any:
        name = self._strip_protocol(path)
        if any(letter in mode for letter in "wax"):
            self._make_parents(name)
        raw = self.files.open(name, mode)
        size = block_size or _BUFFER_BYTES
        if "+" in mode:
            return io.BufferedRandom(raw, size)
        return io.BufferedReader(raw, size) if mode.startswith("r") else io.BufferedWriter(raw, size)

    def _make_parents(self, name: str) -> None:
        if self.auto_mkdir:
            self.makedirs(self._parent(name), exist_ok=True)

    def mkdir(self, path: str, create_parents: bool = True, **_options: Any) -> None:
        name = self._strip_protocol(path)
        if create_parents:
            self.makedirs(self._parent(name), exist_ok=True)
        self.files.mkdir(name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        name = self._strip_protocol(path)
        if self.isdir(name):
            if exist_ok:
                return
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        self.makedirs(self._parent(name), exist_ok=True)
        try:
            self.files.mkdir(name)
        except FileExistsError:
            # Another program may have made it meanwhile.
            if not (exist_ok and self.isdir(name)):
                raise

    def rmdir(self, path: str) -> None:
        self.files.rmdir(self._strip_protocol(path))

    def rm_file(self, path: str) -> None:
        self.files.unlink(self._strip_protocol(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        if maxdepth is not None:
            super().rm(path, recursive=recursive, maxdepth=maxdepth)
            return
        for one in path if isinstance(path, list) else [path]:
            name = self._strip_protocol(one)
            if not self.isdir(name) or self.islink(name):
                self.files.unlink(name)
            elif recursive:
                self._remove_tree(name)
            else:
                raise IsADirectoryError(errno.EISDIR, "give recursive=True to remove a directory", name)

    def _rm(self, path: str) -> None:
        if self.isdir(path) and not self.islink(path):
            self.rmdir(path)
        else:
            self.rm_file(path)

    def _remove_tree(self, name: str) -> None:
        # Depth first without recursion: trees may be deeper than Python's stack.
        directories, pending = [], [name]
        while pending:
            directory = pending.pop()
            directories.append(directory)
            for entry, kind in self.files.scan(directory):
                below = f"{directory}/{entry}"
                if stat.S_ISDIR(kind or self.files.stat(below, follow_symlinks=False).st_mode):
                    pending.append(below)
                else:
                    self.files.unlink(below)
        for directory in reversed(directories):
            self.files.rmdir(directory)

    def cp_file(self, path1: str, path2: str, **_options: Any) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if self.isdir(source):
            self.makedirs(target, exist_ok=True)
            return
        self._make_parents(target)
        buffer = memoryview(bytearray(_COPY_BYTES))
        with self.files.open(source) as reader, self.files.open(target, "w") as writer:
            while count := reader.readinto(buffer):
                left = buffer[:count]
                while left:
                    left = left[writer.write(left) :]

    def mv(
        self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_options: Any
    ) -> None:
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        self._make_parents(target)
        if self.isdir(target):
            target = f"{target.rstrip('/')}/{source.rpartition('/')[2]}"
        self.files.rename(source, target)

    def link(self, src: str, dst: str) -> None:
        self.files.link(self._strip_protocol(src), self._strip_protocol(dst))

    def symlink(self, src: str, dst: str) -> None:
        """Makes `dst` a link to `src`, which stays as it is written."""
        self.files.symlink(stringify_path(src), self._strip_protocol(dst))

    def chmod(self, path: str, mode: int) -> None:
        self.files.chmod(self._strip_protocol(path), mode)

    def touch(self, path: str, truncate: bool = True, **_options: Any) -> None:
        name = self._strip_protocol(path)
        self._make_parents(name)
        self.files.open(name, "w" if truncate else "a").close()
        now_ns = int(datetime.datetime.now(tz=datetime.UTC).timestamp() * 1_000_000_000)
        self.files.utime(name, ns=(now_ns, now_ns))

    def created(self, path: str) -> datetime.datetime:
        """When the inode last changed: Linux's stat(2) tells no birth."""
        return datetime.datetime.fromtimestamp(self.info(path)["created"], tz=datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)


def _type(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "other"
