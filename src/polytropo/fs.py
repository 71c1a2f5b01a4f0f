"""Files of a mount through memory that this process shares with its service, without entering the kernel.

    with Files("/mnt", socket="/run/.polytropo/channel.sock") as files:
        with files.open("data/large") as file:
            file.readinto(buffer)
        files.stat("data").st_mode

Paths are relative to the mount. Whatever this way does not do (a mount point inside, a file that programs
have open for writing through the kernel, ...) is done through the kernel instead, with the same result. All
calls release the interpreter's lock. After a fork the child goes through the kernel. When the service dies,
operations go through the kernel until another channel is made, a moment later, and open files for good.
"""

import errno
import io
import os
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from polytropo.amid import Made, is_done, open_again
from polytropo.errors import PolytropoError

try:
    from polytropo import _native
except ImportError as error:
    raise ImportError("polytropo's native module is not built; run `make build`") from error

if TYPE_CHECKING:
    from typing_extensions import Buffer

_T = TypeVar("_T")
_NS = 1_000_000_000
# From the end of a channel to the next one; doubles with each that did not last ten times as long.
_PAUSE_MIN_S, _PAUSE_MAX_S, _LASTING = 0.1, 30.0, 10
_AT_SYMLINK_NOFOLLOW, _AT_REMOVEDIR = 0x100, 0x200
_NativeStatus = tuple[int, int, int, int, int, int, int, int, int, int, int, int]


class NoChannel(PolytropoError):
    """The service gives this process no channel."""


class Files:
    """The files of one mount."""

    def __init__(self, mountpoint: str | os.PathLike[str], socket: str | os.PathLike[str]) -> None:
        """Connects to the service at `socket` (`channel/channel.sock` in the tenant's run directory)."""
        self.mountpoint = Path(mountpoint)
        self.kernel_calls = 0
        """Operations that were done through the kernel."""
        self._socket = os.fsencode(socket)
        root = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._channel = _native.Channel.connect(self._socket, root)
        except _native.NoChannel as refused:
            os.close(root)
            raise NoChannel(f"{self.mountpoint}: {refused}") from None
        except OSError as failed:
            os.close(root)
            raise NoChannel(
                f"the service at {os.fspath(socket)} cannot be reached: {failed.strerror}"
            ) from failed
        # For what the kernel has to do: leads to this mount, whatever is mounted over it later.
        self._root = root
        self._device = os.fstat(root).st_dev
        self._process = os.getpid()
        self._connecting = threading.Lock()
        self._pause_s = _PAUSE_MIN_S
        self._made = time.monotonic()
        self._ended: float | None = None

    def close(self) -> None:
        """Gives the channel up. Open files are of no use any more."""
        self._channel.disconnect()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, path: str, ours: Callable[[bytes], _T], kernel: Callable[[str], _T]) -> _T:
        relative = path.lstrip("/") or "."
        if self._ended is not None:
            self._connect_again()
        channel = self._channel
        try:
            return ours(os.fsencode(relative))
        except _native.AskKernel:
            pass
        except _native.Gone:
            self._gone(channel)
        except OSError as failed:
            raise OSError(failed.errno, os.strerror(failed.errno or 0), path) from None
        self.kernel_calls += 1
        return kernel(relative)

    def _change(
        self,
        path: str,
        ours: Callable[[bytes], None],
        kernel: Callable[[str], None],
        made: Made | None = None,
        made_at: str | None = None,
    ) -> None:
        """The same for what must not be done twice: a service that died may have done it, and `made` this."""
        amid: BaseException | None = None

        def noted(name: bytes) -> None:
            nonlocal amid
            try:
                ours(name)
            except _native.GoneAmid as died:
                amid = died
                raise

        try:
            self._do(path, noted, kernel)
        except FileNotFoundError:
            if amid is None or made is not None:
                raise
        except FileExistsError:
            if amid is None or made is None:
                raise
            name = (path if made_at is None else made_at).lstrip("/")
            if not is_done(name, self._root, made, amid, lambda: kernel(path.lstrip("/"))):
                raise

    def _gone(self, channel: "_native.Channel") -> None:
        """This channel has ended; there may be another one by now, which has not."""
        with self._connecting:
            if self._ended is None and channel is self._channel:
                self._ended = time.monotonic()
                lasted = self._ended - self._made >= _LASTING * self._pause_s
                self._pause_s = _PAUSE_MIN_S if lasted else min(2 * self._pause_s, _PAUSE_MAX_S)

    def _connect_again(self) -> None:
        """Makes another channel if it is time; one thread does, the others do without meanwhile."""
        ended = self._ended
        if ended is None or time.monotonic() - ended < self._pause_s or os.getpid() != self._process:
            return
        if not self._connecting.acquire(blocking=False):
            return
        try:
            if self._ended is None or self._root < 0:
                return
            self._channel = _native.Channel.connect(self._socket, self._root)
            self._ended, self._made = None, time.monotonic()
        except (_native.NoChannel, OSError):
            self._ended, self._pause_s = time.monotonic(), min(2 * self._pause_s, _PAUSE_MAX_S)
        finally:
            self._connecting.release()

    def open(self, path: str, mode: str = "r", permissions: int = 0o666) -> "io.FileIO | File":
        """Opens a file of bytes, unbuffered: `mode` as for the built-in open, always binary."""
        flags = _flags_of(mode)

        amid: BaseException | None = None

        def ours(name: bytes) -> "io.FileIO | File":
            nonlocal amid
            channel = self._channel
            try:
                number, found = channel.open(name, flags, permissions, _umask())
            except _native.GoneAmid as died:
                amid = died
                raise
            return File(self, channel, number, flags, path, found[1])

        def kernel(name: str) -> "io.FileIO | File":
            wanted = flags | os.O_CLOEXEC
            if amid is None:
                descriptor = os.open(name, wanted, permissions, dir_fd=self._root)
            else:
                descriptor = open_again(name, wanted, permissions, self._root, _umask(), amid)
            return io.FileIO(descriptor, mode.replace("b", "").replace("x", "w"), closefd=True)

        return self._do(path, ours, kernel)

    def stat(self, path: str, *, follow_symlinks: bool = True) -> os.stat_result:
        flags = 0 if follow_symlinks else _AT_SYMLINK_NOFOLLOW
        return self._do(
            path,
            lambda name: _result(self._channel.stat(name, flags), self._device),
            lambda name: os.stat(name, dir_fd=self._root, follow_symlinks=follow_symlinks),
        )

    def exists(self, path: str) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            self.stat(path)
            return True
        return False

    def listdir(self, path: str = ".") -> list[str]:
        return [name for name, _ in self.scan(path)]

    def scan(self, path: str = ".") -> list[tuple[str, int]]:
        """Names with their types as in `st_mode` (0 where the directory does not tell)."""

        def ours(name: bytes) -> list[tuple[str, int]]:
            channel = self._channel
            number, _ = channel.open(name, os.O_RDONLY | os.O_DIRECTORY, 0, 0)
            try:
                return [(os.fsdecode(entry), kind) for entry, kind in channel.list(number)]
            finally:
                with suppress(_native.Gone):
                    channel.close(number)

        def kernel(name: str) -> list[tuple[str, int]]:
            descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
            try:
                with os.scandir(descriptor) as entries:
                    return [
                        (entry.name, stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode))
                        for entry in entries
                    ]
            finally:
                os.close(descriptor)

        return self._do(path, ours, kernel)

    def read_bytes(self, path: str) -> bytes:
        with self.open(path) as file:
            return file.read()

    def write_bytes(self, path: str, data: "Buffer") -> None:
        with self.open(path, "w") as file:
            left = memoryview(data).cast("B")
            while left:
                left = left[file.write(left) :]

    def readlink(self, path: str) -> str:
        return self._do(
            path,
            lambda name: os.fsdecode(self._channel.readlink(name)),
            lambda name: os.readlink(name, dir_fd=self._root),
        )

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        umask = _umask()
        self._change(
            path,
            lambda name: self._channel.mkdir(name, mode, umask),
            lambda name: os.mkdir(name, mode, dir_fd=self._root),
            Made(stat.S_IFDIR | mode & ~umask),
        )

    def unlink(self, path: str) -> None:
        self._change(
            path,
            lambda name: self._channel.unlink(name, 0),
            lambda name: os.unlink(name, dir_fd=self._root),
        )

    def rmdir(self, path: str) -> None:
        self._change(
            path,
            lambda name: self._channel.unlink(name, _AT_REMOVEDIR),
            lambda name: os.rmdir(name, dir_fd=self._root),
        )

    def rename(self, path: str, new_path: str) -> None:
        new = new_path.lstrip("/") or "."
        self._change(
            path,
            lambda name: self._channel.rename(name, os.fsencode(new)),
            lambda name: os.rename(name, new, src_dir_fd=self._root, dst_dir_fd=self._root),
        )

    def symlink(self, target: str, path: str) -> None:
        self._change(
            path,
            lambda name: self._channel.symlink(os.fsencode(target), name),
            lambda name: os.symlink(target, name, dir_fd=self._root),
            Made(stat.S_IFLNK | 0o777, target=target),
        )

    def link(self, path: str, new_path: str) -> None:
        new = new_path.lstrip("/") or "."
        self._change(
            path,
            lambda name: self._channel.link(name, os.fsencode(new)),
            lambda name: os.link(
                name, new, src_dir_fd=self._root, dst_dir_fd=self._root, follow_symlinks=False
            ),
            Made(0, source=path.lstrip("/")),
            new,
        )

    def chmod(self, path: str, mode: int) -> None:
        self._do(
            path,
            lambda name: self._channel.chmod(name, mode),
            lambda name: os.chmod(name, mode, dir_fd=self._root),
        )

    def utime(self, path: str, *, ns: tuple[int, int]) -> None:
        self._do(
            path,
            lambda name: self._channel.utime(name, *ns),
            lambda name: os.utime(name, ns=ns, dir_fd=self._root),
        )


class File(io.RawIOBase):
    """An open file of a channel. Bytes that are cached are read without asking the service.

    When the channel ends, or a program opens the file for writing through the kernel, the kernel opens it by
    its name. ESTALE if that leads to another file by then.
    """

    def __init__(
        self, files: Files, channel: "_native.Channel", number: int, flags: int, name: str, inode: int
    ) -> None:
        self._files = files
        self._channel = channel
        self._number = number
        self._flags = flags
        self._offset = 0
        self.name = name
        self._inode = inode
        # Once the kernel has opened it.
        self._descriptor: int | None = None
        self._opening = threading.Lock()

    def _run(self, ours: Callable[[], _T], kernel: Callable[[int], _T]) -> _T:
        if self.closed:
            raise ValueError("I/O operation on closed file")
        if self._descriptor is None:
            try:
                return ours()
            except _native.AskKernel:
                pass
            except _native.Gone:
                self._files._gone(self._channel)
        return kernel(self._kernel_file())

    def _kernel_file(self) -> int:
        """The kernel's open file in place of the service's."""
        with self._opening:
            if self._descriptor is None:
                # What was written without waiting and is lost is told now.
                with suppress(_native.AskKernel, _native.Gone):
                    self._channel.close(self._number)
                flags = self._flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | os.O_CLOEXEC
                opened = os.open(self.name.lstrip("/"), flags, dir_fd=self._files._root)
                if os.fstat(opened).st_ino != self._inode:
                    os.close(opened)
                    raise OSError(errno.ESTALE, "another file has the name by now", self.name)
                self._descriptor = opened
            return self._descriptor

    def readable(self) -> bool:
        return self._flags & os.O_ACCMODE != os.O_WRONLY

    def writable(self) -> bool:
        return self._flags & os.O_ACCMODE != os.O_RDONLY

    def seekable(self) -> bool:
        return True

    def pread(self, count: int, offset: int) -> bytes:
        return self._run(
            lambda: self._channel.pread(self._number, count, offset), lambda fd: os.pread(fd, count, offset)
        )

    def pread_into(self, buffer: "Buffer", offset: int) -> int:
        """Reads straight into a writable buffer, such as a numpy array."""
        return self._run(
            lambda: self._channel.pread_into(self._number, buffer, offset),
            lambda fd: os.preadv(fd, [buffer], offset),
        )

    def pwrite(self, data: "Buffer", offset: int) -> int:
        return self._run(
            lambda: self._channel.pwrite(self._number, data, offset), lambda fd: os.pwrite(fd, data, offset)
        )

    def readinto(self, buffer: "Buffer") -> int:
        count = self.pread_into(buffer, self._offset)
        self._offset += count
        return count

    def readall(self) -> bytes:
        parts = []
        while part := self.pread(max(self.stat().st_size - self._offset, 1 << 16), self._offset):
            self._offset += len(part)
            parts.append(part)
        return b"".join(parts)

    def write(self, data: "Buffer") -> int:
        count = self.pwrite(data, self._offset)
        self._offset = self.stat().st_size if self._flags & os.O_APPEND else self._offset + count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_CUR:
            offset += self._offset
        elif whence == os.SEEK_END:
            offset += self.stat().st_size
        elif whence != os.SEEK_SET:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        if offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.name)
        self._offset = offset
        return offset

    def tell(self) -> int:
        return self._offset

    def truncate(self, size: int | None = None) -> int:
        wanted = self._offset if size is None else size
        self._run(lambda: self._channel.ftruncate(self._number, wanted), lambda fd: os.ftruncate(fd, wanted))
        return wanted

    def stat(self) -> os.stat_result:
        return self._run(
            lambda: _result(self._channel.fstat(self._number), self._files._device), lambda fd: os.fstat(fd)
        )

    def fsync(self, *, data_only: bool = False) -> None:
        self._run(
            lambda: self._channel.fsync(self._number, data_only),
            lambda fd: os.fdatasync(fd) if data_only else os.fsync(fd),
        )

    def close(self) -> None:
        if not self.closed:
            try:
                if self._descriptor is not None:
                    os.close(self._descriptor)
                    self._descriptor = None
                else:
                    with suppress(_native.AskKernel, _native.Gone):
                        self._channel.close(self._number)
            finally:
                super().close()


def _umask() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


_MODES = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "a": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+": os.O_RDWR | os.O_CREAT | os.O_APPEND,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}


def _flags_of(mode: str) -> int:
    flags = _MODES.get(mode.replace("b", ""))
    if flags is None:
        raise ValueError(f"{mode!r} is no mode of a file of bytes; write r, w, a or x, with + for both")
    return flags


def _result(found: _NativeStatus, device: int) -> os.stat_result:
    mode, ino, nlink, uid, gid, size, atime, mtime, ctime, blocks, blksize, rdev = found
    seconds = [when // _NS for when in (atime, mtime, ctime)]
    floats = [when / _NS for when in (atime, mtime, ctime)]
    # As the C library lays it out: ten fields, then times with fractions, in nanoseconds, and the rest.
    return os.stat_result(
        (
            mode,
            ino,
            device,
            nlink,
            uid,
            gid,
            size,
            *seconds,
            *floats,
            atime,
            mtime,
            ctime,
            blksize,
            blocks,
            rdev,
        )
    )
