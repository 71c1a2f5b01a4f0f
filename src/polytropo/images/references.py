"""Names of images: `debian` means `debian:latest`."""

import re

from polytropo.images.errors import ImageError, shown

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?(?::[0-9]{1,5})?/)"
_REFERENCE = re.compile(rf"({_HOST}?{_PART}(?:/{_PART})*)(?::([a-zA-Z0-9_][a-zA-Z0-9_.-]{{0,127}}))?")
_NAME_MAX = 255
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{3,64})")


def normalized(reference: str) -> str:
    """The name with its tag. Raises ImageError for what cannot name an image.

    >>> normalized("debian"), normalized("localhost:5000/app:1")
    ('debian:latest', 'localhost:5000/app:1')
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None or len(match[1]) > _NAME_MAX:
        raise ImageError(
            f"{shown(reference)} cannot name an image; write NAME or NAME:TAG, the name in lower case"
            " letters, digits, '.', '_', '-' and '/'"
        )
    return f"{match[1]}:{match[2] or 'latest'}"


def is_name(reference: str) -> bool:
    """Whether `normalized` takes it."""
    match = _REFERENCE.fullmatch(reference)
    return match is not None and len(match[1]) <= _NAME_MAX


def id_prefix(reference: str) -> str | None:
    """The hexadecimal digits, if this could be the beginning of an image's id."""
    match = _ID.fullmatch(reference)
    return match[1] if match else None


def name_from_file(file_name: str) -> str | None:
    """A name for what a file holds, if the file's own name has one.

    >>> name_from_file("My-App_1.tar.gz")
    'my-app_1'
    """
    stem = re.sub(r"(\.(tar|tgz|oci|docker|gz|zst|tzst|img))+$", "", file_name.lower())
    stem = re.sub(r"[^a-z0-9]+$|^[^a-z0-9]+", "", re.sub(r"[^a-z0-9._-]+", "-", stem))
    return stem if is_name(stem) else None
