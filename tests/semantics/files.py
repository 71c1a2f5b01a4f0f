"""Promises about the bytes of files."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import sys

from tests.semantics.registry import LARGE_BYTES, LARGE_DATA, Ground, promise

_libc = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE = 1, 2
AT_SYMLINK_FOLLOW = 0x400


def in_another_process(script: str, *arguments: object) -> str:
    """Runs Python code in a process of its own and returns what it printed."""
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout


@promise("read-after-write")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    for i in range(50):
        os.pwrite(fd, b"%03d" % i, i * 5000)
        assert path.stat().st_size == i * 5000 + 3
        script = "import os, sys; print(os.pread(os.open(sys.argv[1], 0), 3, int(sys.argv[2])).decode())"
        if i % 10 == 0:
            assert in_another_process(script, path, i * 5000).strip() == f"{i:03d}"
    os.close(fd)


@promise("append")
def _(ground: Ground) -> None:
    path = ground.empty / "log"
    script = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for i in range(300):
    os.write(fd, (sys.argv[2] * 30 + "\\n").encode())
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 900 and all(len(set(line)) == 1 and len(line) == 30 for line in lines)


@promise("unlinked-open")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.write(fd, b"before")
    path.unlink()
    os.write(fd, b" after")
    assert os.pread(fd, 99, 0) == b"before after"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


@promise("mmap")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    path.write_bytes(bytes(3 * 4096))
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 0) as shared, mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE) as private:
        shared[4096:4101] = b"hello"
        assert os.pread(fd, 5, 4096) == b"hello"
        os.pwrite(fd, b"world", 8192)
        assert shared[8192:8197] == b"world"
        private[0:1] = b"x"
        assert os.pread(fd, 1, 0) == b"\0"
        shared.flush()
    os.close(fd)
    assert path.read_bytes()[4096:4101] == b"hello"


@promise("holes")
def _(ground: Ground) -> None:
    fd = os.open(ground.empty / "file", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"x" * 65536, 0)
    os.pwrite(fd, b"y", 1 << 20)
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 65536
    assert os.lseek(fd, 65536, os.SEEK_DATA) == 1 << 20
    blocks = os.fstat(fd).st_blocks
    punched = _libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(8192), ctypes.c_long(16384))
    assert punched == 0, os.strerror(ctypes.get_errno())
    assert os.pread(fd, 65536, 0) == b"x" * 8192 + bytes(16384) + b"x" * 40960
    os.fsync(fd)
    assert os.fstat(fd).st_blocks < blocks or blocks == 0
    os.close(fd)


@promise("preallocation")
def _(ground: Ground) -> None:
    fd = os.open(ground.empty / "file", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, 100_000)
    assert os.fstat(fd).st_size == 100_000
    assert _libc.fallocate(fd, KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(1 << 20)) == 0
    assert os.fstat(fd).st_size == 100_000
    assert os.fstat(fd).st_blocks * 512 >= 1 << 20
    os.close(fd)


@promise("copy-file-range")
def _(ground: Ground) -> None:
    source, target = ground.empty / "source", ground.empty / "target"
    source.write_bytes(os.urandom(200_000))
    with source.open("rb") as reader, target.open("wb") as writer:
        copied = 0
        while count := os.copy_file_range(reader.fileno(), writer.fileno(), 200_000):
            copied += count
    assert copied == 200_000 and source.read_bytes() == target.read_bytes()


@promise("changed-in-place")
def _(ground: Ground) -> None:
    path = ground.image / "large"
    expected = bytearray(LARGE_BYTES)
    for at in LARGE_DATA:
        expected[at : at + 100_000] = b"image" * 20_000
    reader = os.open(path, os.O_RDONLY)
    before = os.fstat(reader)
    mapped = mmap.mmap(reader, 0, prot=mmap.PROT_READ)
    old = bytes(expected)
    path.chmod(0o640)
    assert mapped[:] == expected
    with path.open("r+b", buffering=0) as file:
        for at in (5, 70_000, (1 << 20) - 3, 2 << 20, LARGE_BYTES - 2):
            expected[at : at + 5] = b"12345"
            file.seek(at)
            assert file.write(b"12345") == 5
        seen = old if ground.passthrough else bytes(expected)
        assert os.pread(reader, len(expected) + 1, 0) == seen and mapped[:] == seen[:LARGE_BYTES]
        punched = _libc.fallocate(
            file.fileno(), KEEP_SIZE | PUNCH_HOLE, ctypes.c_long(3 << 20), ctypes.c_long(50_000)
        )
        assert punched == 0, os.strerror(ctypes.get_errno())
        expected[3 << 20 : (3 << 20) + 50_000] = bytes(50_000)
        assert path.read_bytes() == expected
        with mmap.mmap(file.fileno(), 0) as shared:
            shared[3_000_000:3_000_006] = expected[3_000_000:3_000_006] = b"mapped"
            shared.flush()
        os.fsync(file.fileno())
    assert os.lseek(reader, (3 << 20) + 131_072, os.SEEK_DATA) >= LARGE_BYTES - 65_536
    assert subprocess.run(["cmp", "-", path], input=expected, check=False, timeout=60).returncode == 0
    copy = path.with_name("copy")
    subprocess.run(["cp", "--sparse=always", path, copy], check=True, timeout=60)
    assert copy.read_bytes() == expected
    os.truncate(path, 1 << 20)
    os.truncate(path, 2 << 20)
    assert path.read_bytes() == expected[: 1 << 20] + bytes(1 << 20)
    assert path.stat().st_ino == before.st_ino == os.fstat(reader).st_ino
    mapped.close()
    os.close(reader)


@promise("direct-io")
def _(ground: Ground) -> None:
    path = ground.empty / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    with mmap.mmap(-1, 8192) as buffer:
        buffer[:] = b"d" * 8192
        assert os.pwrite(fd, buffer, 4096) == 8192
        buffer[:] = bytes(8192)
        assert os.preadv(fd, [buffer], 4096) == 8192
        assert buffer[:] == b"d" * 8192
    os.close(fd)
    assert path.read_bytes() == bytes(4096) + b"d" * 8192


@promise("tmpfile")
def _(ground: Ground) -> None:
    fd = os.open(ground.empty, os.O_RDWR | os.O_TMPFILE)
    os.write(fd, b"made in secret")
    assert list(ground.empty.iterdir()) == []
    shown = os.fsencode(ground.empty / "shown")
    # os.link cannot: it calls link(2), which never follows.
    assert _libc.linkat(-100, b"/proc/self/fd/%d" % fd, -100, shown, AT_SYMLINK_FOLLOW) == 0
    os.close(fd)
    assert (ground.empty / "shown").read_bytes() == b"made in secret"


@promise("text-busy")
def _(ground: Ground) -> None:
    program = ground.empty / "sleep"
    program.write_bytes(open("/bin/sleep", "rb").read())  # noqa: PTH123, SIM115
    program.chmod(0o755)
    process = subprocess.Popen([program, "60"])
    try:
        os.close(os.open(program, os.O_WRONLY))
        raise AssertionError("a running program was opened for writing")
    except OSError as refusal:
        assert refusal.errno == errno.ETXTBSY
    finally:
        process.kill()
        process.wait()


@promise("large-files")
def _(ground: Ground) -> None:
    fd = os.open(ground.empty / "file", os.O_RDWR | os.O_CREAT)
    end = (1 << 40) + 17
    os.pwrite(fd, b"end", end)
    assert os.fstat(fd).st_size == end + 3 and os.pread(fd, 9, end) == b"end"
    os.ftruncate(fd, 1)
    os.close(fd)
