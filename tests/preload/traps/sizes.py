"""Files of all sizes, with holes, and names of any bytes."""

import os

from trap import attempt, begin, sh

begin()
for size in (0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 1_000_003, 5 << 20):
    data = bytes(range(256)) * (size // 256) + b"e" * (size % 256)
    for turn in range(3):
        file = os.open("sized", os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        print(size, os.write(file, data), os.fstat(file).st_size, os.lseek(file, 0, os.SEEK_END))
        print(
            os.pread(file, size + 10, 0) == data,
            os.pread(file, 10, max(size - 3, 0)),
            os.pread(file, 5, size + 1),
        )
        os.close(file)
        with open("sized", "rb") as again:
            print(again.read() == data, again.read(1), again.seek(0, 2))
        print(os.stat("sized").st_size, sh("cksum <sized").strip())
for turn in range(3):
    file = os.open("sparse", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    print(os.pwrite(file, b"far", 5 << 32), os.fstat(file).st_size, os.pread(file, 4, (5 << 32) - 1))
    print(
        os.lseek(file, 0, os.SEEK_DATA) == 5 << 32,
        os.lseek(file, 0, os.SEEK_HOLE),
        os.stat("sparse").st_blocks < 100,
    )
    print(
        os.write(file, b"near"),
        os.lseek(file, 3 << 32, os.SEEK_SET),
        os.write(file, b"middle"),
        os.read(file, 3),
    )
    print(os.truncate("sparse", (3 << 32) + 3), os.pread(file, 20, 3 << 32), os.lseek(file, 0, os.SEEK_CUR))
    print(attempt(os.lseek, file, -1, os.SEEK_SET), attempt(os.pwrite, file, b"x", (1 << 63) - 1))
    print(attempt(os.ftruncate, file, -1), attempt(os.pread, file, 1, -1), os.pread(file, 1, 1 << 60))
    os.close(file)
    print(sh("head -c 4 sparse; tail -c 3 sparse; stat -c %s sparse"))
os.unlink("sparse")
NAMES = [
    b"\xff\xfe",
    b"new\nline",
    b"tab\t",
    b"-",
    b"--",
    b"*",
    b" ",
    b"\xc3\xa4",
    b"a" * 255,
    b"\x01",
    b"...",
    b"%s%n",
]
for turn in range(3):
    for name in NAMES:
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(file, name)
        os.close(file)
        assert open(name, "rb").read() == name and os.stat(name).st_size == len(name)
    print(sorted(set(os.listdir(b".")) & set(NAMES)) == sorted(NAMES), sh("ls -A | cksum"))
    print(attempt(os.open, b"a" * 256, os.O_CREAT), attempt(os.stat, b"\xff\xfd"))
    for name in NAMES:
        os.rename(name, b"moved")
        assert open(b"moved", "rb").read() == name
        os.unlink(b"moved")
