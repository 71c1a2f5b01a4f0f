"""Who a container's program runs as: names looked up in the image's own passwd and group files."""

import errno

import msgspec

from polytropo.errors import PolytropoError
from polytropo.names import shown
from polytropo.rooted import read_in_root

_FILE_MAX_BYTES = 4 << 20
_GROUPS_MAX = 1024
_ID_MAX = 2**32 - 2


class User(msgspec.Struct, frozen=True):
    """The ids of a process and its home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def resolve_user(root: int, wanted: str) -> User:
    """The user that `wanted` ("", USER, UID, USER:GROUP) means in the root directory `root`.

    Raises PolytropoError for a name that the image does not know, and for a damaged file.
    """
    user_name, colon, group_name = wanted.partition(":")
    passwd, group_file = _read(root, "/etc/passwd"), _read(root, "/etc/group")
    entry = _user_entry(passwd, user_name or "0")
    if entry is None:
        if not user_name.isdecimal():
            raise PolytropoError(
                f"the image has no user {shown(user_name)} in its /etc/passwd; give one of those, or a number"
            )
        entry = ("", _checked_id(user_name), 0, "/")
    login, uid, gid, home = entry
    if colon and group_name:
        return User(uid, _group_id(group_file, group_name), (), home)
    groups = _memberships(group_file, login) if login else ()
    return User(uid, gid, groups, home)


def _user_entry(passwd: list[list[str]], wanted: str) -> tuple[str, int, int, str] | None:
    """Name, uid, gid and home of the first line whose name, else number, is `wanted`."""
    for column in (0, 2):
        for fields in passwd:
            if len(fields) >= 6 and fields[column] == wanted and fields[0]:
                if not (_is_id(fields[2]) and _is_id(fields[3])):
                    continue
                return fields[0], int(fields[2]), int(fields[3]), fields[5] or "/"
        if not _is_id(wanted):
            break
    return ("root", 0, 0, "/root") if wanted == "0" else None


def _group_id(groups: list[list[str]], wanted: str) -> int:
    for fields in groups:
        if len(fields) >= 3 and fields[0] == wanted and _is_id(fields[2]):
            return int(fields[2])
    if not wanted.isdecimal():
        raise PolytropoError(
            f"the image has no group {shown(wanted)} in its /etc/group; give one that it has, or a number"
        )
    return _checked_id(wanted)


def _memberships(groups: list[list[str]], login: str) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for fields in groups:
        if len(fields) >= 4 and _is_id(fields[2]) and login in fields[3].split(","):
            found[int(fields[2])] = None
    return tuple(found)[:_GROUPS_MAX]


def _read(root: int, path: str) -> list[list[str]]:
    """The lines of a colon-separated file; none if there is no such file."""
    try:
        content = read_in_root(root, path, _FILE_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise PolytropoError(
                "the service behind the container's root has ended; start the container anew"
            ) from None
        raise PolytropoError(
            f"the image's {path} cannot be read: {error.strerror}; mend the image"
        ) from error
    except ValueError as error:
        raise PolytropoError(f"the image's {path} cannot be used: {error}; mend the image") from error
    lines = content.decode("utf-8", "replace").splitlines()
    return [line.strip().split(":") for line in lines if line.strip() and not line.startswith("#")]


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text[:11]) <= _ID_MAX and len(text) <= 10


def _checked_id(text: str) -> int:
    if not _is_id(text):
        raise PolytropoError(f"{text[:40]} is no user or group id; the largest is {_ID_MAX}")
    return int(text)
