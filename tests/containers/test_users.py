"""Users are looked up in the image's own files, whatever those are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytropo.containers.users import User, resolve_user
from polytropo.errors import PolytropoError

_PASSWD = """root:x:0:0:root:/root:/bin/sh
1000:x:7:8::/odd:/bin/sh
app:x:1000:1001::/home/app:
# a comment
bad:x:-1:0::/:
broken
"""
_GROUP = "root:x:0:\nstaff:x:50:app,other\napps:x:1001:app\nhuge:x:99999999999:app\n"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(_PASSWD)
    (tmp_path / "etc/group").write_text(_GROUP)
    return tmp_path


@pytest.fixture
def root(image: Path) -> Iterator[int]:
    descriptor = os.open(image, os.O_PATH | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize(
    ("wanted", "user"),
    [
        ("", User(0, 0, (), "/root")),
        ("root", User(0, 0, (), "/root")),
        ("app", User(1000, 1001, (50, 1001), "/home/app")),
        ("app:50", User(1000, 50, (), "/home/app")),
        ("app:staff", User(1000, 50, (), "/home/app")),
        ("1000", User(7, 8, (), "/odd")),  # a name that is a number comes before that number
        ("4711", User(4711, 0, (), "/")),
        ("4711:12", User(4711, 12, (), "/")),
    ],
)
def test_users(root: int, wanted: str, user: User) -> None:
    assert resolve_user(root, wanted) == user


@pytest.mark.parametrize(
    "wanted", ["nobody", "app:nobody", "bad", "4294967295", "99999999999", "-1", "app:-1"]
)
def test_unknown_users(root: int, wanted: str) -> None:
    with pytest.raises(PolytropoError):
        resolve_user(root, wanted)


def test_an_image_without_files(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_PATH)
    try:
        assert resolve_user(descriptor, "") == User(0, 0, (), "/root")
        assert resolve_user(descriptor, "5:6") == User(5, 6, (), "/")
    finally:
        os.close(descriptor)


def test_links_stay_inside(image: Path, root: int) -> None:
    """The host has an /etc/passwd too; a link to it means the image's."""
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("/elsewhere/passwd")
    (image / "elsewhere").mkdir()
    (image / "elsewhere/passwd").write_text("inner:x:9:9::/:\n")
    assert resolve_user(root, "inner").uid == 9
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").symlink_to("../../../../../../../etc/other")
    (image / "etc/other").write_text("inner:x:8:8::/:\n")
    assert resolve_user(root, "inner").uid == 8
    with pytest.raises(PolytropoError):
        resolve_user(root, "daemon")


@pytest.mark.timeout(20)
def test_hostile_files(image: Path, root: int) -> None:
    (image / "etc/passwd").unlink()
    os.mkfifo(image / "etc/passwd")
    with pytest.raises(PolytropoError, match="regular"):
        resolve_user(root, "app")
    (image / "etc/passwd").unlink()
    (image / "etc/passwd").mkdir()
    with pytest.raises(PolytropoError):
        resolve_user(root, "app")
    (image / "etc/passwd").rmdir()
    with (image / "etc/passwd").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PolytropoError, match="larger"):
        resolve_user(root, "app")
    (image / "etc/passwd").write_bytes(b"\xff\xfe:x:1:1:\x00:/\n" * 100 + b"app:x:3:3::/:\n")
    assert resolve_user(root, "app").uid == 3
