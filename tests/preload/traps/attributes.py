"""Modes under umasks, times, owners and extended attributes of what is written without the kernel."""

import os
import stat
import time

from trap import attempt, begin, in_child, sh

begin()


def mode(path: str) -> str:
    return stat.filemode(os.stat(path).st_mode)


for mask in (0o022, 0, 0o077, 0o777, 0o027):
    before = os.umask(mask)
    for wanted in (0o666, 0o4755, 0o600, 0):
        name = f"{mask:o}-{wanted:o}"
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, wanted)
        print(name, oct(before), mode(name), os.write(file, b"x"), os.read(file, 1))
        os.close(file)
    print(
        in_child(
            lambda: (os.umask(0o111), os.close(os.open("child", os.O_CREAT, 0o666)), print(mode("child")))
        )
    )
    os.unlink("child")
os.umask(0o022)
sh("umask 007; echo >other")
print(mode("other"))
for turn in range(3):
    file = os.open("file", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.write(file, b"bytes")
    os.setxattr("file", "user.one", b"1")
    os.setxattr(file, "user.two", b"2" * 100)
    print(sorted(os.listxattr(file)), os.getxattr("file", "user.two")[:3], os.getxattr(file, "user.one"))
    os.write(file, b" more")
    print(
        attempt(os.getxattr, "file", "user.none"),
        attempt(os.setxattr, file, "user.one", b"", os.XATTR_CREATE),
    )
    os.removexattr(file, "user.one")
    print(os.listxattr("file"), os.fstat(file).st_size, os.stat("file").st_size)
    os.fchmod(file, 0o640)
    os.fchown(file, 1000, 1000)
    os.write(file, b"!")
    print(mode("file"), os.stat("file").st_uid, os.fstat(file).st_gid)
    os.utime(file, ns=(1_000_000_001, 2_000_000_002))
    print(os.stat("file").st_mtime_ns, os.fstat(file).st_atime_ns)
    print(sh("stat -c '%Y %s %a %u' file").strip())
    now = time.time()
    os.write(file, b"later")
    print(abs(os.fstat(file).st_mtime - now) < 60, abs(os.stat("file").st_ctime - now) < 60)
    os.utime("file", ns=(5, 7))
    print(os.fstat(file).st_mtime_ns, sh("stat -c %Y file").strip())
    os.close(file)
    print(os.stat("file").st_mtime_ns)
    os.chmod("file", 0o6755)

    def ordinary() -> None:
        os.setresuid(1000, 1000, 1000)
        begin_own = os.open("file", os.O_WRONLY)
        os.write(begin_own, b"w")

    print(in_child(ordinary), mode("file"))
    os.unlink("file")
os.mkdir("shared", 0o2775)
os.chown("shared", -1, 1000)
os.chmod("shared", 0o2775)
os.close(os.open("shared/file", os.O_CREAT | os.O_WRONLY))
print(os.stat("shared/file").st_gid, mode("shared"))
os.chmod("known", 0o4755)
file = os.open("known", os.O_WRONLY)
os.write(file, b"x")
print(mode("known"))
