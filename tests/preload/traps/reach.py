"""What paths lead to changes: roots, mounts inside and over, namespaces."""

import ctypes
import os

from trap import attempt, begin, in_child, sh

libc = ctypes.CDLL(None, use_errno=True)
MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 4096, 16384, 1 << 18, 2
begin()
os.makedirs("inner/root/deep")
for path in ("inner/file", "inner/root/known", "inner/root/deep/file"):
    with open(path, "w") as file:
        file.write(path)


def mount(source: str, target: str, flags: int = MS_BIND, kind: str | None = None) -> int:
    return int(libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, flags, None))


def look(*paths: str) -> list[object]:
    def read(path: str) -> object:
        file = os.open(path, os.O_RDONLY)
        try:
            return os.read(file, 30)
        finally:
            os.close(file)

    return [(attempt(read, path), attempt(lambda path: os.stat(path).st_size, path)) for path in paths]


PATHS = ("known", "inner/file", "inner/root/known", "inner/root/deep/file", "inner/../known", "nothing")


def other_root() -> None:
    begin()
    file = os.open("known", os.O_RDONLY)
    writes = os.open("inner/root/known", os.O_RDWR)
    os.chdir("inner/root")
    os.chroot(".")
    for _ in range(3):
        print(look("known", "/known", "/deep/file", "../known", "/../known", "/proc/self/fd/0"))
        print(os.read(file, 3), os.pwrite(writes, b"R", 0), os.getcwd())
    made = os.open("/made", os.O_CREAT | os.O_RDWR)
    print(os.write(made, b"in the root"), os.path.exists("/inner"))


def other_mounts() -> None:
    begin()
    for _ in range(3):
        print(look(*PATHS))
    file, writes = os.open("inner/file", os.O_RDONLY), os.open("inner/file", os.O_WRONLY)
    print(libc.unshare(0x20000), mount("none", "/", MS_REC | MS_PRIVATE))
    print(mount("inner/root", "inner/root/deep"), look(*PATHS, "inner/root/deep/known"))
    print(mount("none", "inner", 0, "tmpfs"), look(*PATHS), os.read(file, 5), os.write(writes, b"W"))
    with open("inner/file", "w") as made:
        made.write("on a tmpfs")
    print(
        look(*PATHS),
        os.listdir("inner"),
        attempt(os.rename, "inner/file", "file"),
        attempt(os.link, "known", "inner/k"),
    )
    print(libc.umount2(b"inner", MNT_DETACH), look(*PATHS))
    print(mount("known", "inner/file"), look(*PATHS), attempt(os.unlink, "inner/file"))
    print(mount(".", "inner"), look(*PATHS), sorted(os.listdir("inner")) == sorted(os.listdir(".")))
    with open("inner/through", "w") as made:
        made.write("both ways")
    print(look("through", "inner/through"), os.path.samefile("through", "inner/through"))


def read_only() -> None:
    begin()
    print(libc.unshare(0x20000), mount("none", "/", MS_REC | MS_PRIVATE))
    before = os.open("known", os.O_RDWR)
    print(mount(".", "."), mount(".", ".", MS_BIND | 32 | 1))
    os.chdir(os.getcwd())
    print(
        attempt(os.open, "known", os.O_RDWR), attempt(os.open, "new", os.O_CREAT | os.O_WRONLY), look("known")
    )
    print(attempt(os.unlink, "known"), attempt(os.mkdir, "d"), os.pwrite(before, b"0", 0))


for what in (other_root, other_mounts, read_only):
    print(what.__name__, in_child(what))
    print(look(*PATHS, "inner/root/made"))
# By others, and what was known before.
for turn in range(2):
    print(look(*PATHS))
    print(
        sh("unshare -m sh -c 'mount -t tmpfs none inner && echo x >inner/file && cat inner/file'"),
        look(*PATHS),
    )
print(in_child(lambda: (libc.unshare(0x10000000), print(look(*PATHS)))))
