"""Promises about names and directories."""

from __future__ import annotations

import ctypes
import errno
import os
import threading

from tests.semantics.registry import Ground, promise

_libc = ctypes.CDLL(None, use_errno=True)
NOREPLACE, EXCHANGE = 1, 2


def renameat2(old: object, new: object, flags: int) -> int:
    """renameat2(2); returns 0 or the error number."""
    code = _libc.renameat2(-100, os.fsencode(str(old)), -100, os.fsencode(str(new)), flags)
    return 0 if code == 0 else ctypes.get_errno()


@promise("rename-atomic")
def _(ground: Ground) -> None:
    target = ground.empty / "target"
    target.write_bytes(b"0" * 10_000)
    stop = threading.Event()
    wrong: list[bytes] = []

    def look() -> None:
        while not stop.is_set():
            content = target.read_bytes()
            if len(content) != 10_000 or len(set(content)) != 1:
                wrong.append(content)

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(200):
        fresh = ground.empty / "fresh"
        fresh.write_bytes(b"%d" % (i % 10) * 10_000)
        fresh.rename(target)
    stop.set()
    reader.join()
    assert not wrong


@promise("rename-flags")
def _(ground: Ground) -> None:
    one, two = ground.empty / "one", ground.empty / "two"
    one.write_text("1")
    two.mkdir()
    assert renameat2(one, two, NOREPLACE) == errno.EEXIST
    assert renameat2(one, two, EXCHANGE) == 0
    assert one.is_dir() and two.read_text() == "1"


@promise("rename-directory")
def _(ground: Ground) -> None:
    before = (ground.image / "tree").stat().st_ino
    (ground.image / "tree").rename(ground.empty / "moved")
    assert (ground.empty / "moved" / "inner" / "file").read_text() == "inner"
    assert (ground.empty / "moved").stat().st_ino == before
    assert not (ground.image / "tree").exists()
    (ground.empty / "moved").rename(ground.image / "tree")
    assert (ground.image / "tree" / "inner" / "file").read_text() == "inner"


@promise("names")
def _(ground: Ground) -> None:
    names = [b"\xff\xfe\x80", b"a" * 255, b" ", b"\n\t", "grüße".encode(), b"-", b".hidden", b"*"]
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(ground.empty), name), os.O_CREAT | os.O_WRONLY))  # noqa: PTH118
    assert sorted(os.listdir(os.fsencode(ground.empty))) == sorted(names)  # noqa: PTH208
    try:
        (ground.empty / ("a" * 256)).touch()
        raise AssertionError("a name of 256 bytes was taken")
    except OSError as refusal:
        assert refusal.errno == errno.ENAMETOOLONG


@promise("hard-links")
def _(ground: Ground) -> None:
    linked, also = ground.image / "linked", ground.image / "also-linked"
    assert linked.stat().st_ino == also.stat().st_ino and linked.stat().st_nlink == 2
    with linked.open("ab") as file:
        file.write(b"more")
    assert also.read_bytes().endswith(b"more")
    assert linked.stat().st_ino == also.stat().st_ino and also.stat().st_nlink == 2
    third = ground.empty / "third"
    third.hardlink_to(also)
    assert third.stat().st_nlink == 3
    linked.unlink()
    assert third.read_bytes().endswith(b"more") and third.stat().st_nlink == 2


@promise("readdir-while-changing")
def _(ground: Ground) -> None:
    stays = {f"stays-{i}" for i in range(500)}
    for name in stays:
        (ground.empty / name).touch()
    seen: list[str] = []
    with os.scandir(ground.empty) as entries:
        for i, entry in enumerate(entries):
            seen.append(entry.name)
            if i < 300:
                (ground.empty / f"new-{i}").touch()
                if i % 2:
                    (ground.empty / f"new-{i - 1}").unlink()
    assert len(seen) == len(set(seen)), "a name was listed twice"
    assert stays <= set(seen), "a name that stayed was not listed"


@promise("deleted-directory")
def _(ground: Ground) -> None:
    directory = ground.empty / "directory"
    directory.mkdir()
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    directory.rmdir()
    assert os.listdir(fd) == []  # noqa: PTH208  by descriptor
    try:
        os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        raise AssertionError("a file was made in a directory that is gone")
    except OSError as refusal:
        assert refusal.errno == errno.ENOENT
    os.close(fd)


@promise("special-files")
def _(ground: Ground) -> None:
    import socket

    fifo = ground.empty / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 99) == b"through"
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        os.chdir(ground.empty)
        server.bind("socket")
        server.listen()
        client.connect("socket")
    os.chdir("/")


@promise("symbolic-links")
def _(ground: Ground) -> None:
    link = ground.empty / "link"
    target = "x" * 4000
    link.symlink_to(target)
    assert str(link.readlink()) == target and link.lstat().st_size == 4000
