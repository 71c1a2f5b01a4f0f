"""Owners, modes and attributes of files on disk: in the inodes, or in extended attributes."""

import errno
import os
import stat
from dataclasses import dataclass
from typing import Literal

from polytropo.images.errors import ImageError, shown

Ownership = Literal["native", "xattr"]

STAT_XATTR = b"user.polytropo.stat"
RESERVED_XATTR = b"user.polytropo."
KEPT_XATTR = b"user.polytropo.xattr."
_KEPT = (b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default")


@dataclass(slots=True, frozen=True)
class Attributes:
    """What a program in a container sees of a file, without its data; `mode` has the type bits."""

    mode: int
    uid: int
    gid: int
    rdev: int
    mtime_ns: int
    xattrs: dict[bytes, bytes]


def wanted_xattrs(xattrs: dict[bytes, bytes], name: bytes) -> dict[bytes, bytes]:
    """Those attributes from an archive that a layer keeps: of users, capabilities, ACLs.

    Labels and trusted attributes mean something to the machine that made the archive, or to the
    kernel of this one; they are left out.
    """
    for key in xattrs:
        if key.startswith(RESERVED_XATTR):
            raise ImageError(f"its entry {shown(name)} has the reserved attribute {shown(key)}")
    return {k: v for k, v in xattrs.items() if k in _KEPT or (k.startswith(b"user.") and len(k) > 5)}


def stat_record(attributes: Attributes) -> bytes:
    """The value of `user.polytropo.stat`."""
    return b"%o %d %d %d" % (attributes.mode, attributes.uid, attributes.gid, attributes.rdev)


def read_attributes(
    status: os.stat_result, path: bytes, ownership: Ownership
) -> tuple[Attributes, dict[bytes, bytes]]:
    """What programs see of an inode, and the marks `user.polytropo.*` that they do not see.

    `path` leads to the inode without following a link.
    """
    xattrs = {os.fsencode(key): _get_xattr(path, key) for key in os.listxattr(path, follow_symlinks=False)}
    marks = {key: value for key, value in xattrs.items() if key.startswith(RESERVED_XATTR)}
    kept = {key: value for key, value in xattrs.items() if key not in marks and _is_kept(key, ownership)}
    mode, uid, gid, rdev = status.st_mode, status.st_uid, status.st_gid, status.st_rdev
    if ownership == "xattr":
        uid, gid, rdev = 0, 0, 0
        if STAT_XATTR in marks:
            mode, uid, gid, rdev = _parse_stat(marks[STAT_XATTR], path)
        hidden = {key[len(KEPT_XATTR) :]: value for key, value in marks.items() if key.startswith(KEPT_XATTR)}
        kept |= {key: value for key, value in hidden.items() if key in _KEPT}
    return Attributes(mode, uid, gid, rdev, status.st_mtime_ns, kept), marks


def _is_kept(key: bytes, ownership: Ownership) -> bool:
    return key.startswith(b"user.") or (ownership == "native" and key in _KEPT)


def write_attributes(target: int | bytes, attributes: Attributes, ownership: Ownership) -> None:
    """Gives a new inode its attributes. `target` is a descriptor, or the path of what cannot be opened."""
    if ownership == "native":
        _write_native(target, attributes)
    else:
        _write_xattr(target, attributes)
    if isinstance(target, int):
        os.utime(target, ns=(attributes.mtime_ns, attributes.mtime_ns))
    else:
        os.utime(target, ns=(attributes.mtime_ns, attributes.mtime_ns), follow_symlinks=False)


def clear_xattrs(descriptor: int) -> None:
    """Removes all attributes that `write_attributes` may have set."""
    for name in os.listxattr(descriptor):
        if name.startswith(("user.", "security.capability", "system.posix_acl_")):
            os.removexattr(descriptor, name)


def _write_native(target: int | bytes, attributes: Attributes) -> None:
    mode = stat.S_IMODE(attributes.mode)
    is_link = stat.S_ISLNK(attributes.mode)
    if isinstance(target, int):
        if attributes.uid or attributes.gid:
            os.fchown(target, attributes.uid, attributes.gid)
        os.fchmod(target, mode)
    else:
        os.chown(target, attributes.uid, attributes.gid, follow_symlinks=False)
        if not is_link:
            os.chmod(target, mode)  # noqa: PTH101
    for key, value in attributes.xattrs.items():
        if not (is_link and key.startswith(b"user.")):
            _set_xattr(target, key, value)


def _write_xattr(target: int | bytes, attributes: Attributes) -> None:
    if stat.S_ISLNK(attributes.mode):
        return
    _set_xattr(target, STAT_XATTR, stat_record(attributes))
    for key, value in attributes.xattrs.items():
        _set_xattr(target, key if key.startswith(b"user.") else KEPT_XATTR + key, value)


def _set_xattr(target: int | bytes, key: bytes, value: bytes) -> None:
    try:
        if isinstance(target, int):
            os.setxattr(target, key, value)
        else:
            os.setxattr(target, key, value, follow_symlinks=False)
    except OSError as error:
        # ext4 says "no space" of attributes that do not fit into their block.
        if error.errno in (errno.ENOSPC, errno.E2BIG, errno.ERANGE) and value:
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG)) from error
        raise


def _get_xattr(path: bytes, key: str) -> bytes:
    return os.getxattr(path, key, follow_symlinks=False)


def _parse_stat(value: bytes, path: bytes) -> tuple[int, int, int, int]:
    try:
        mode, uid, gid, rdev = value.split(b" ")
        numbers = int(mode, 8), int(uid), int(gid), int(rdev)
        if not all(0 <= number < 2**64 for number in numbers):
            raise ValueError
        return numbers
    except ValueError:
        raise ImageError(f"the attribute user.polytropo.stat of {shown(path)} is damaged") from None
