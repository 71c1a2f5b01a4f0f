"""Unpacks a layer's tar archive into a directory that nothing in the archive leads out of.

Every name is resolved by the kernel with the layer's tree as its root (openat2(2), RESOLVE_IN_ROOT), and the
last component is never followed. Memory does not grow with the archive: what has to wait for the
end, the times of directories, waits in a file.
"""

import errno
import os
import stat
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from polytropo.errors import StorageError
from polytropo.images.errors import ImageError, shown
from polytropo.images.ownership import (
    Attributes,
    Ownership,
    clear_xattrs,
    wanted_xattrs,
    write_attributes,
)
from polytropo.images.streams import CHUNK_BYTES, Readable
from polytropo.images.tar_reader import Entry, Kind, TarReader
from polytropo.rooted import open_in_root
from polytropo.tenants import UIDS_PER_TENANT
from polytropo.trees import remove_tree
from polytropo.units import format_size

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
RESERVED = b".wh..wh.polytropo"
_WHITEOUT_META = b".wh..wh."  # what aufs kept for itself; Docker drops it too

_OPEN_DIRECTORIES_MAX = 32
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MAJOR_MAX, _MINOR_MAX = 0xFFF, 0xFFFFF
# Free space is asked for when a file is larger than this, or so much was written since.
_SPACE_CHECK_BYTES = 16 << 20
_DEFERRED = struct.Struct("<qqH")

_TYPE_BITS = {
    Kind.FILE: stat.S_IFREG,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHARACTER_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.FIFO: stat.S_IFIFO,
}
# Errors that the entry caused and not the machine, and what to say of them.
_ENTRY_ERRORS = {
    errno.ENOTDIR: "lies below something that is no directory",
    errno.EEXIST: "lies below a link that leads nowhere",
    errno.ELOOP: "lies below links that lead to each other",
    errno.ENAMETOOLONG: "has a name that is too long for this filesystem",
    errno.EINVAL: "has a name or owner that this filesystem does not take",
    errno.EILSEQ: "has a name that this filesystem does not take",
    errno.EFBIG: "is larger than this filesystem lets a file be",
    errno.EMLINK: "is one hard link more than this filesystem allows",
    errno.E2BIG: "has extended attributes that are too large for this filesystem",
}


class Extractor:
    """Unpacks one archive into `tree`, an empty directory; `spool` is an empty file for its own use."""

    def __init__(self, tree: Path, ownership: Ownership, spool: IO[bytes]) -> None:
        self._tree = tree
        self._root = os.open(tree, _DIRECTORY | os.O_CLOEXEC)
        self._ownership = ownership
        self._native = ownership == "native"
        self._deferred = spool
        self._directories: OrderedDict[bytes, int] = OrderedDict()
        self._stale: list[int] = []
        self._unchecked_bytes = _SPACE_CHECK_BYTES
        self.entries = 0
        self.size_bytes = 0

    def run(self, reader: TarReader) -> None:
        """Unpacks all entries. Raises ImageError for a hostile one, OSError when the filesystem refuses."""
        try:
            self._finish_directory(self._root, b"", _implicit_attributes(), mtime_ns=0)
            for entry in reader:
                self.entries += 1
                self._close_stale()
                with _entry_errors(entry.name):
                    self._unpack(reader, entry)
            self._set_directory_times()
        finally:
            self._stale += [*self._directories.values(), self._root]
            self._close_stale()

    def _unpack(self, reader: TarReader, entry: Entry) -> None:
        components = _components(entry.name)
        if not components:
            if entry.kind is not Kind.DIRECTORY:
                raise ImageError(f"its entry {shown(entry.name)} names the root, but is a {entry.kind.value}")
            clear_xattrs(self._root)
            self._finish_directory(self._root, b"", _attributes(entry), entry.mtime_ns)
            return
        *above, name = components
        if not _check_whiteouts(entry, above, name):
            return
        parent = self._parent(b"/".join(above))
        if name.startswith(WHITEOUT):
            self._make_whiteout(parent, name, entry)
        elif entry.kind is Kind.DIRECTORY:
            self._make_directory(parent, name, entry, b"/".join(components))
        elif entry.kind is Kind.FILE:
            self._make_file(parent, name, entry, reader)
        elif entry.kind is Kind.HARD_LINK:
            self._make_hard_link(parent, name, entry)
        else:
            self._make_special(parent, name, entry)

    def _make_whiteout(self, parent: int, name: bytes, entry: Entry) -> None:
        descriptor = self._create(parent, name)
        try:
            attributes = Attributes(stat.S_IFREG | 0o600, 0, 0, 0, entry.mtime_ns, {})
            write_attributes(descriptor, attributes, self._ownership)
        finally:
            os.close(descriptor)

    def _make_directory(self, parent: int, name: bytes, entry: Entry, path: bytes) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
            is_new = True
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
                self._remove(parent, name)
                os.mkdir(name, 0o700, dir_fd=parent)
            is_new = False
        descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            if not is_new:
                clear_xattrs(descriptor)
            self._finish_directory(descriptor, path, _attributes(entry), entry.mtime_ns)
        except BaseException:
            os.close(descriptor)
            raise
        self._remember(path, descriptor)

    def _make_file(self, parent: int, name: bytes, entry: Entry, reader: TarReader) -> None:
        self._check_space(entry)
        attributes = _attributes(entry)
        descriptor = self._create(parent, name)
        try:
            if entry.pieces is None:
                _copy_data(reader, descriptor, entry.size_bytes)
            else:
                for offset, length in entry.pieces:
                    os.lseek(descriptor, offset, os.SEEK_SET)
                    _copy_data(reader, descriptor, length)
                os.ftruncate(descriptor, entry.size_bytes)
            write_attributes(descriptor, attributes, self._ownership)
        finally:
            os.close(descriptor)
        self.size_bytes += entry.size_bytes

    def _make_hard_link(self, parent: int, name: bytes, entry: Entry) -> None:
        *above, target = _components(entry.link_name) or [b"."]
        try:
            source = open_in_root(self._root, b"/".join(above) or b".", os.O_PATH | os.O_DIRECTORY)
            try:
                self._link(source, target, parent, name)
            finally:
                os.close(source)
        except (FileNotFoundError, NotADirectoryError):
            raise ImageError(
                f"its entry {shown(entry.name)} is a hard link to {shown(entry.link_name)},"
                " which does not come before it"
            ) from None
        except PermissionError:
            raise ImageError(
                f"its entry {shown(entry.name)} is a hard link to {shown(entry.link_name)},"
                " which cannot have another name"
            ) from None

    def _link(self, source: int, target: bytes, parent: int, name: bytes) -> None:
        try:
            os.link(target, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if os.path.samestat(there, os.stat(target, dir_fd=source, follow_symlinks=False)):
                return
            self._remove(parent, name)
            os.link(target, name, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)

    def _make_special(self, parent: int, name: bytes, entry: Entry) -> None:
        attributes = _attributes(entry)
        path = b"/proc/self/fd/%d/%s" % (parent, name)
        for attempt in (1, 2):
            try:
                self._make_inode(parent, name, entry, attributes)
                break
            except FileExistsError:
                if attempt == 2:
                    raise
                self._remove(parent, name)
        write_attributes(path, attributes, self._ownership)

    def _make_inode(self, parent: int, name: bytes, entry: Entry, attributes: Attributes) -> None:
        if entry.kind is Kind.SYMLINK:
            if not entry.link_name:
                raise ImageError(f"its entry {shown(entry.name)} is a symbolic link to nothing")
            os.symlink(entry.link_name, name, dir_fd=parent)
        elif not self._native:
            os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=parent))
        else:
            os.mknod(name, stat.S_IFMT(attributes.mode) | 0o600, attributes.rdev, dir_fd=parent)

    def _create(self, parent: int, name: bytes) -> int:
        try:
            return os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        except FileExistsError:
            self._remove(parent, name)
            return os.open(name, _NEW_FILE, 0o600, dir_fd=parent)

    def _remove(self, parent: int, name: bytes) -> None:
        """Makes room for a later entry of the same name."""
        # What was opened by a path may be gone now, or elsewhere; `parent` is still in use.
        self._stale += self._directories.values()
        self._directories.clear()
        try:
            os.unlink(name, dir_fd=parent)
        except IsADirectoryError:
            remove_tree(Path(os.fsdecode(b"/proc/self/fd/%d/%s" % (parent, name))))

    def _parent(self, path: bytes) -> int:
        """A descriptor of the directory `path`, made with all above it where it is missing."""
        descriptor = self._directories.get(path)
        if descriptor is not None:
            self._directories.move_to_end(path)
            return descriptor
        if not path:
            return self._root
        try:
            descriptor = open_in_root(self._root, path, _DIRECTORY)
        except FileNotFoundError:
            above, _, name = path.rpartition(b"/")
            parent = self._parent_of_missing(above)
            os.mkdir(name, 0o700, dir_fd=parent)
            descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            self._finish_directory(descriptor, path, _implicit_attributes(), mtime_ns=0)
        self._remember(path, descriptor)
        return descriptor

    def _parent_of_missing(self, path: bytes) -> int:
        # From the top down, so that a deep name needs no deep recursion.
        components = path.split(b"/") if path else []
        descriptor = self._root
        for depth in range(1, len(components) + 1):
            above = b"/".join(components[:depth])
            try:
                found = self._directories.get(above)
                descriptor = found if found is not None else open_in_root(self._root, above, _DIRECTORY)
            except FileNotFoundError:
                os.mkdir(components[depth - 1], 0o700, dir_fd=descriptor)
                descriptor = open_in_root(self._root, above, _DIRECTORY | os.O_NOFOLLOW)
                self._finish_directory(descriptor, above, _implicit_attributes(), mtime_ns=0)
            self._remember(above, descriptor)
        return descriptor

    def _remember(self, path: bytes, descriptor: int) -> None:
        before = self._directories.get(path)
        if before is not None and before != descriptor:
            os.close(before)
        self._directories[path] = descriptor
        self._directories.move_to_end(path)
        while len(self._directories) > _OPEN_DIRECTORIES_MAX:
            os.close(self._directories.popitem(last=False)[1])

    def _close_stale(self) -> None:
        while self._stale:
            os.close(self._stale.pop())

    def _finish_directory(self, descriptor: int, path: bytes, attributes: Attributes, mtime_ns: int) -> None:
        write_attributes(descriptor, attributes, self._ownership)
        seconds, ns = divmod(mtime_ns, 10**9)
        self._deferred.write(_DEFERRED.pack(seconds, ns, len(path)) + path)

    def _set_directory_times(self) -> None:
        """Directories get their times last, since making files in them changes these."""
        self._deferred.flush()
        self._deferred.seek(0)
        while record := self._deferred.read(_DEFERRED.size):
            seconds, ns, length = _DEFERRED.unpack(record)
            path = self._deferred.read(length) or b"."
            # A later entry may have put something else in its place.
            with suppress(FileNotFoundError, NotADirectoryError):
                descriptor = open_in_root(self._root, path, _DIRECTORY | os.O_NOFOLLOW)
                try:
                    time_ns = seconds * 10**9 + ns
                    os.utime(descriptor, ns=(time_ns, time_ns))
                finally:
                    os.close(descriptor)

    def _check_space(self, entry: Entry) -> None:
        """Refuses what cannot fit before it fills the disk."""
        self._unchecked_bytes += entry.data_bytes
        if self._unchecked_bytes <= _SPACE_CHECK_BYTES and entry.pieces is None:
            return
        self._unchecked_bytes = 0
        space = os.fstatvfs(self._root)
        free_bytes = space.f_bavail * space.f_frsize
        if entry.data_bytes > free_bytes:
            raise StorageError(
                f"cannot unpack {shown(entry.name)}: it takes {format_size(entry.data_bytes)}, but"
                f" the filesystem of {self._tree} has {format_size(free_bytes)} left;"
                " free some space (`polytropo system prune`)",
                errno.ENOSPC,
            )
        if entry.size_bytes > space.f_blocks * space.f_frsize:
            raise ImageError(
                f"its sparse file {shown(entry.name)} pretends to be {format_size(entry.size_bytes)} long,"
                " more than the whole filesystem"
            )


def unpack(source: Readable, tree: Path, ownership: Ownership) -> None:
    """Unpacks a plain tar archive into the new directory `tree`. Raises ImageError or OSError."""
    tree.mkdir(mode=0o700)
    with tempfile.TemporaryFile(dir=tree.parent) as spool:
        Extractor(tree, ownership, spool).run(TarReader(source))


def _components(name: bytes) -> list[bytes]:
    """The parts of a name, without the leading slashes that Docker drops as well."""
    components = [part for part in name.split(b"/") if part not in (b"", b".")]
    if b".." in components:
        raise ImageError(f'its entry {shown(name)} has ".." in its name or link')
    return components


def _check_whiteouts(entry: Entry, above: list[bytes], name: bytes) -> bool:
    """Whether the entry is one to unpack, by the names that unions give a meaning."""
    if RESERVED in (*above, name):
        raise ImageError(f"its entry {shown(entry.name)} uses the reserved name {RESERVED.decode()}")
    if any(part.startswith(_WHITEOUT_META) for part in above):
        return False
    if any(part.startswith(WHITEOUT) for part in above):
        raise ImageError(f"its entry {shown(entry.name)} lies below a whiteout")
    if not name.startswith(WHITEOUT) or name == OPAQUE:
        return True
    if name.startswith(_WHITEOUT_META):
        return False
    if name in (b".wh.", b".wh..", b".wh..."):
        raise ImageError(f"its entry {shown(entry.name)} is a whiteout of nothing")
    if entry.kind is Kind.DIRECTORY:
        raise ImageError(f"its entry {shown(entry.name)} is a directory with the name of a whiteout")
    return True


def _attributes(entry: Entry) -> Attributes:
    for what, value in (("uid", entry.uid), ("gid", entry.gid)):
        if value >= UIDS_PER_TENANT:
            raise ImageError(
                f"its entry {shown(entry.name)} belongs to {what} {value}, and services know ids below"
                f" {UIDS_PER_TENANT:,} only; give it a smaller one and build the image anew"
            )
    device = 0
    if entry.kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE):
        if entry.device_major > _MAJOR_MAX or entry.device_minor > _MINOR_MAX:
            raise ImageError(f"its entry {shown(entry.name)} has an impossible device number")
        device = os.makedev(entry.device_major, entry.device_minor)
    mode = _TYPE_BITS[entry.kind] | (0o777 if entry.kind is Kind.SYMLINK else entry.mode)
    xattrs = wanted_xattrs(entry.xattrs, entry.name) if entry.xattrs else {}
    return Attributes(mode, entry.uid, entry.gid, device, entry.mtime_ns, xattrs)


def _implicit_attributes() -> Attributes:
    """Of a directory that the archive needs but does not hold."""
    return Attributes(stat.S_IFDIR | 0o755, 0, 0, 0, 0, {})


def _copy_data(reader: TarReader, descriptor: int, length: int) -> None:
    while length:
        view = memoryview(reader.read(min(length, CHUNK_BYTES)))
        length -= len(view)
        while view:
            view = view[os.write(descriptor, view) :]


@contextmanager
def _entry_errors(name: bytes) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = _ENTRY_ERRORS.get(error.errno or 0)
        if problem is None:
            raise
        raise ImageError(f"its entry {shown(name)} {problem}") from error
