"""`polytropo.fs`: the same files through a channel and through the kernel."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper

# Runs where the mount is: the service looks at the mount table of the process that connects.
_PRELUDE = """
import os, sys
from pathlib import Path
from polytropo.fs import Files, NoChannel
mnt, socket = Path(sys.argv[1]), sys.argv[2]
"""


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    started = Keeper(isolated, arguments=["--channel-writes"])
    yield started
    started.close()


def run(keeper: Keeper, mnt: Path, script: str) -> None:
    socket = keeper.run_dir / "channel" / "channel.sock"
    keeper.place.run(sys.executable, "-c", _PRELUDE + script, mnt, socket)


def mounted(keeper: Keeper, name: str, **options: object) -> Path:
    source, mnt = keeper.place.directory / name, keeper.place.directory / f"mnt-{name}"
    source.mkdir(exist_ok=True)
    keeper.mount(source, mnt, **options)
    return mnt


def test_reads_and_looks_without_the_kernel(keeper: Keeper) -> None:
    source = keeper.place.directory / "layer"
    (source / "d").mkdir(parents=True)
    (source / "d" / "small").write_bytes(b"content")
    (source / "large").write_bytes(bytes(range(256)) * 4096)
    (source / "link").symlink_to("d/small")
    mnt = mounted(keeper, "layer", coherence="immutable", read_only=True)
    run(
        keeper,
        mnt,
        """
with Files(mnt, socket) as files:
    assert files.read_bytes("d/small") == b"content"
    assert files.read_bytes("link") == b"content"
    buffer = bytearray(1 << 20)
    with files.open("large") as large:
        assert large.readinto(buffer) == 1 << 20 and buffer == (mnt / "large").read_bytes()
        assert large.seek(-3, os.SEEK_END) == (1 << 20) - 3
        assert large.read(10) == bytes([253, 254, 255]) and large.read(1) == b""
    for name in ("d", "d/small", "large", "link"):
        ours, kernel = files.stat(name), os.stat(mnt / name)
        for field in "mode ino dev nlink uid gid size mtime_ns ctime_ns blocks rdev".split():
            assert getattr(ours, f"st_{field}") == getattr(kernel, f"st_{field}"), (name, field)
    assert files.stat("link", follow_symlinks=False).st_mode == os.lstat(mnt / "link").st_mode
    assert files.readlink("link") == "d/small"
    assert sorted(files.listdir()) == ["d", "large", "link"]
    assert dict(files.scan())["d"] == 0o040000
    assert not files.exists("none") and not files.exists("large/x")
    try:
        files.open("none")
    except FileNotFoundError as error:
        assert error.filename == "none"
    else:
        raise AssertionError("a file that is not there was opened")
    try:
        files.write_bytes("new", b"x")
    except OSError as error:
        assert error.errno == 30
    assert files.kernel_calls == 0
    if os.fork() == 0:
        # A child has no channel; it works all the same.
        good = files.read_bytes("d/small") == b"content" and files.kernel_calls > 0
        os._exit(0 if good else 1)
    assert os.wait()[1] == 0
    assert files.read_bytes("d/small") == b"content"
""",
    )


def test_changes_are_those_of_the_kernel(keeper: Keeper) -> None:
    mnt = mounted(keeper, "data", coherence="exclusive")
    run(
        keeper,
        mnt,
        """
os.umask(0o027)
with Files(mnt, socket) as files:
    files.mkdir("d")
    assert (mnt / "d").stat().st_mode & 0o7777 == 0o750
    files.write_bytes("d/f", b"0123456789")
    assert (mnt / "d" / "f").read_bytes() == b"0123456789"
    assert (mnt / "d" / "f").stat().st_mode & 0o7777 == 0o640
    with files.open("d/f", "r+") as file:
        file.seek(2)
        file.write(b"ab")
        assert file.tell() == 4
        file.truncate(5)
        file.fsync()
        assert file.pread(10, 0) == b"01ab4"
    with files.open("d/f", "a") as file:
        file.write(b"end")
        assert file.tell() == 8
    assert (mnt / "d" / "f").read_bytes() == b"01ab4end"
    files.rename("d/f", "g")
    files.link("g", "h")
    files.symlink("g", "l")
    files.chmod("g", 0o600)
    files.utime("g", ns=(1_500_000_000, 2_500_000_000))
    seen = (mnt / "h").stat()
    assert (seen.st_nlink, seen.st_mode & 0o7777) == (2, 0o600)
    assert (seen.st_atime_ns, seen.st_mtime_ns) == (1_500_000_000, 2_500_000_000)
    assert sorted(os.listdir(mnt)) == sorted(files.listdir()) == ["d", "g", "h", "l"]
    for name in ("g", "h", "l"):
        files.unlink(name)
    files.rmdir("d")
    assert os.listdir(mnt) == []
""",
    )


def test_says_why_there_is_no_channel(keeper: Keeper) -> None:
    mnt = mounted(keeper, "data", coherence="immutable", read_only=True)
    run(
        keeper,
        mnt,
        """
for place, where in ((Path("/"), socket), (mnt, "/nowhere")):
    try:
        Files(place, where)
    except NoChannel as refused:
        assert str(place) in str(refused) or "/nowhere" in str(refused), refused
    else:
        raise AssertionError("connected")
""",
    )


def test_what_a_channel_changes_of_a_file_is_all_that_the_kernel_drops(keeper: Keeper) -> None:
    source = keeper.place.directory / "data"
    source.mkdir()
    (source / "large").write_bytes(bytes(4 << 20))
    mnt = mounted(keeper, "data", coherence="exclusive")
    run(
        keeper,
        mnt,
        """
import ctypes, mmap
kernel = open(mnt / "large", "rb", buffering=0)
assert len(kernel.read()) == 4 << 20
libc = ctypes.CDLL(None)
def cached():
    "Which pages the kernel has."
    pages = (ctypes.c_ubyte * 1024)()
    view = mmap.mmap(kernel.fileno(), 4 << 20, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(4 << 20), pages) == 0
    return [page & 1 for page in pages]
assert all(cached())
with Files(mnt, socket) as files, files.open("large", "r+b") as large:
    large.seek(2 << 20)
    large.write(b"changed")
    large.flush()
    left = cached()
    assert not left[512] and sum(left) >= 1024 - 64, sum(left)
    assert os.pread(kernel.fileno(), 7, 2 << 20) == b"changed"
    assert os.pread(kernel.fileno(), 7, 1 << 20) == bytes(7)
""",
    )
