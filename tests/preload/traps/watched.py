"""Who watches hears of what it does itself and of what others do through the kernel."""

import ctypes
import os
import struct

from trap import begin, in_child, sh

libc = ctypes.CDLL(None)
MODIFY, CREATE, DELETE, MOVED, CLOSED = 2, 0x100, 0x200, 0xC0, 8
begin()


def told(watch: int) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    while True:
        try:
            events = os.read(watch, 4096)
        except BlockingIOError:
            return found
        while events:
            _, mask, _, length = struct.unpack_from("iIII", events)
            event = hex(mask), events[16 : 16 + length].rstrip(b"\0")
            events = events[16 + length :]
            if event not in found:
                found.append(event)


def change() -> None:
    with open("watched/file", "a") as file:
        file.write("more")
    os.rename("watched/file", "watched/moved")
    with open("watched/new", "w") as file:
        file.write("new")
    os.unlink("watched/moved")
    os.mkdir("watched/d")
    os.rmdir("watched/d")


os.mkdir("watched")
watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
libc.inotify_add_watch(watch, b"watched", MODIFY | CREATE | DELETE | MOVED | CLOSED)
for turn in range(2):
    sh("echo x >watched/file")
    print(told(watch))
    change()
    print(told(watch))
    sh("echo x >watched/file")
    print(in_child(change), told(watch))
