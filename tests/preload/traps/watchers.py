"""Who watches hears of what other programs do, also with files that they had open before: as dev servers and `tail -f` do."""

import ctypes
import os
import struct
import subprocess
import sys

from trap import begin

MODIFY, ATTRIBUTES, WRITTEN, MOVED, CREATE, DELETE = 2, 4, 8, 0xC0, 0x100, 0x200
NAMES = {
    2: "modify",
    4: "attributes",
    8: "written",
    0x40: "from",
    0x80: "to",
    0x100: "create",
    0x200: "delete",
}


def wait() -> None:
    assert sys.stdin.readline() == "go\n"


def say(what: str) -> None:
    print(what, flush=True)


def write() -> None:
    """Works on files all the time; what it does after it was told to is watched."""
    begin()
    before = os.open("watched/before", os.O_CREAT | os.O_RDWR)
    log = os.open("watched/log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in range(300):
        os.pwrite(before, b"unheard", number * 7)
        os.write(log, b"unheard\n")
        with open(f"watched/{number % 7}", "w") as made:
            made.write("unheard")
    say("busy")
    wait()
    os.write(log, b"a line\n")
    os.pwrite(before, b"heard", 3)
    os.ftruncate(before, 10)
    os.close(before)
    with open("watched/new", "w") as made:
        made.write("bytes")
    os.rename("watched/new", "watched/moved")
    os.link("watched/moved", "watched/linked")
    os.symlink("moved", "watched/symbolic")
    os.chmod("watched/moved", 0o600)
    os.utime("watched/moved", (5, 5))
    os.truncate("watched/moved", 2)
    os.mkdir("watched/directory")
    os.rmdir("watched/directory")
    os.unlink("watched/moved")
    os.write(log, b"another line\n")
    os.close(log)
    say("done")
    wait()
    with open("watched/log") as written:
        print(written.read().count("\n"), sorted(os.listdir("watched")), os.path.getsize("watched/before"))


def watch() -> None:
    if sys.argv[2] == "begun":
        begin()
    libc = ctypes.CDLL(None)
    queue = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    wanted = MODIFY | ATTRIBUTES | WRITTEN | MOVED | CREATE | DELETE
    assert libc.inotify_add_watch(queue, b"watched", wanted) > 0
    say("watching")
    wait()
    events: list[str] = []
    told = os.read(queue, 1 << 16)
    while told:
        _, mask, _, length = struct.unpack_from("iIII", told)
        event = f"{NAMES[mask & 0xFFF]} {told[16 : 16 + length].rstrip(bytes(1)).decode()}"
        if event not in events[-1:]:
            events.append(event)
        told = told[16 + length :]
    print(*events, sep="\n")


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def heard(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline()


if sys.argv[1:]:
    write() if sys.argv[1] == "write" else watch()
    sys.exit()
os.mkdir("watched")
for how in ("begun", "fresh"):
    writer = start("write")
    print(heard(writer), end="")
    watcher = start("watch", how)
    print(heard(watcher), end="")
    go(writer)
    print(heard(writer), end="")
    go(watcher)
    print(watcher.communicate(timeout=30)[0], watcher.returncode)
    go(writer)
    print(writer.communicate(timeout=30)[0], writer.returncode)
    for name in os.listdir("watched"):
        os.unlink(f"watched/{name}")
