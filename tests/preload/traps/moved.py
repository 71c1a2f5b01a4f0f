"""Bytes are moved inside the kernel: between ours and others, with offsets of its own and the files'."""

import fcntl
import os
import shutil
import socket
import tempfile

from trap import attempt, begin

begin()
elsewhere = tempfile.TemporaryFile()
FICLONE = 0x40049409


def fresh(name: str) -> int:
    return os.open(name, os.O_CREAT | os.O_TRUNC | os.O_RDWR)


for turn in range(3):
    ours, theirs = fresh("target"), elsewhere.fileno()
    os.ftruncate(theirs, 0)
    os.lseek(theirs, 0, os.SEEK_SET)
    source = os.open("known", os.O_RDONLY)
    print(os.write(ours, b"begin "), os.read(source, 2))
    print("sendfile", os.sendfile(ours, source, 5, 7), os.sendfile(ours, source, None, 4))
    print(os.lseek(source, 0, os.SEEK_CUR), os.pread(ours, 50, 0))
    print("out", os.sendfile(theirs, source, 0, 20), os.pread(theirs, 50, 0))
    os.lseek(theirs, 0, os.SEEK_SET)
    print("in", os.sendfile(ours, theirs, 0, 3), os.pread(ours, 50, 0))
    print("copied", os.copy_file_range(source, ours, 6, 1), os.copy_file_range(source, ours, 6, 1, 30))
    print(os.pread(ours, 50, 0), os.lseek(source, 0, os.SEEK_CUR), os.lseek(ours, 0, os.SEEK_CUR))
    print("within", os.copy_file_range(ours, ours, 5, 0, 40), os.pread(ours, 50, 0))
    print("across", attempt(os.copy_file_range, ours, theirs, 5, 0, 0) in (5, "Invalid cross-device link"))
    reading, writing = os.pipe()
    print("splice", os.splice(source, writing, 8, offset_src=2), os.read(reading, 20))
    print("splice", os.splice(source, writing, 8), os.read(reading, 20), os.lseek(source, 0, os.SEEK_CUR))
    os.write(writing, b"from a pipe")
    print("splice in", os.splice(reading, ours, 4, offset_dst=3), os.splice(reading, ours, 7))
    print(os.pread(ours, 60, 0))
    here, there = socket.socketpair()
    print("socket", os.sendfile(here.fileno(), source, 1, 9), there.recv(20))
    print("socket", here.sendfile(open("known", "rb")), there.recv(100))
    refused = attempt(fcntl.ioctl, fresh("clone"), FICLONE, os.open("known", os.O_RDONLY))
    print("clone", refused)
    for descriptor in (ours, source, reading, writing):
        os.close(descriptor)
for name in ("copy", "copyfile", "copy2"):
    getattr(shutil, name)("known", name)
    print(open(name).read(), os.stat(name).st_mode)
with open("large", "wb") as file:
    file.write(b"large" * 100_000)
os.system(
    "cp large l2; cp --reflink=auto l2 l3; cp --sparse=always l3 l4; cat l4 >l5; dd if=l5 of=l6 bs=7k 2>&1 | tail -n 0; install l6 l7"
)
os.system(
    "cp -a large $TMPDIR/l8; mv $TMPDIR/l8 l8; rsync l8 l9 2>/dev/null || cp l8 l9; cmp large l9 && cksum large l[2-9]"
)
