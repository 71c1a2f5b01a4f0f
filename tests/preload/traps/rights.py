"""Whoever opened a file goes on with it, whatever rights are lost afterwards."""

import os
import shutil
import subprocess
import sys

from trap import attempt, begin, in_child, sh

if len(sys.argv) == 1:
    begin()
HERE = os.getcwd()
if len(sys.argv) == 1:
    os.chmod(".", 0o755)
    with open("secret", "w") as file:
        file.write("secret bytes")
    os.chmod("secret", 0o600)


def use(file: int, writes: int) -> None:
    print(attempt(os.read, file, 3), attempt(os.pread, file, 6, 0), attempt(os.lseek, file, 0, 1))
    print(attempt(os.write, writes, b"w"), attempt(os.pwrite, writes, b"W", 0), os.fstat(file).st_size)
    # Where the kernel has to do it.
    copy = os.dup(file)
    print(attempt(os.read, copy, 3), attempt(os.read, file, 2))
    print(attempt(os.copy_file_range, file, writes, 3, 0, 20), attempt(os.posix_fallocate, writes, 0, 30))
    print(subprocess.run(["cat"], stdin=file, capture_output=True, check=False).stdout)
    print(in_child(lambda: print(attempt(os.pread, file, 5, 1), attempt(os.write, writes, b" child"))))
    print(attempt(os.ftruncate, writes, 40), os.fstat(writes).st_size, attempt(os.fsync, writes))
    print(attempt(os.open, "secret", os.O_RDONLY) if os.getuid() else "root", os.path.exists("secret"))


def opened() -> tuple[int, int]:
    return os.open("secret", os.O_RDONLY), os.open("kept", os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)


def gives_up_all() -> None:
    begin()
    file, writes = opened()
    os.write(writes, b"as root ")
    os.setgroups([])
    os.setresgid(1000, 1000, 1000)
    os.setresuid(1000, 1000, 1000)
    use(file, writes)


def gives_up_effective() -> None:
    begin()
    file, writes = opened()
    os.seteuid(1000)
    use(file, writes)
    print(attempt(os.open, "secret", os.O_WRONLY), attempt(os.open, "x", os.O_CREAT))
    os.seteuid(0)
    print(os.pread(os.open("secret", os.O_RDONLY), 3, 0))
    use(file, writes)


def loses_mode() -> None:
    """As an ordinary user, whose file is closed to it after it was opened."""
    begin()
    with open("own", "w") as made:
        made.write("own bytes")
    file, writes = os.open("own", os.O_RDONLY), os.open("kept", os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600)
    print(os.read(file, 1), os.write(writes, b"before "))
    os.chmod("own", 0)
    os.chmod("kept", 0)
    # Where the kernel has to open them it cannot: tests/preload/test_opens.py.
    print(attempt(os.open, "own", os.O_RDONLY), attempt(os.open, "kept", os.O_RDWR))
    print(os.read(file, 3), os.pread(file, 6, 0), os.lseek(file, 0, 1), os.fstat(file).st_size)
    print(os.write(writes, b"after"), os.pwrite(writes, b"B", 0), os.fsync(writes), os.pread(writes, 20, 0))
    print(os.ftruncate(writes, 9), os.fstat(writes).st_size)


def loses_the_way() -> None:
    begin()
    os.mkdir("way")
    shutil.copy("known", "way/file")
    for _ in range(50):
        os.close(os.open("way/file", os.O_RDONLY))
    file = os.open("way/file", os.O_RDONLY)
    os.chmod("way", 0)
    print(attempt(os.open, "way/file", os.O_RDONLY), os.read(file, 5), os.read(os.dup(file), 5))
    os.chmod("way", 0o700)


def makes_read_only() -> None:
    """Programs make files that they could not open once more, and go on with them in all ways."""
    begin()
    for mode in (0o444, 0o400, 0o200, 0):
        file = os.open(f"mode{mode:o}", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode)
        print(
            os.write(file, b"made"),
            os.read(os.dup(file), 1),
            os.pread(file, 9, 0),
            os.posix_fallocate(file, 0, 9),
        )
        print(
            attempt(os.open, f"mode{mode:o}", os.O_RDWR),
            os.copy_file_range(file, file, 3, 0, 6),
            os.fsync(file),
        )
        os.close(file)
        file = (
            os.open(f"mode{mode:o}", os.O_WRONLY)
            if mode & 0o200
            else os.open("later", os.O_CREAT | os.O_RDWR)
        )
        print(os.write(file, b"before"), os.fchmod(file, mode & 0o444), os.write(file, b"after"))
        print(os.write(os.dup(file), b"!"), os.fstat(file).st_size, attempt(os.posix_fallocate, file, 0, 20))
        print(
            in_child(lambda: os.write(file, b" child")),
            os.lseek(file, 0, os.SEEK_CUR),
            os.fstat(file).st_mode,
        )
        os.close(file)
        os.unlink("later") if os.path.exists("later") else None
    os.umask(0o777)
    file = os.open("masked", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    print(os.write(file, b"made"), os.write(os.dup(file), b" more"), os.fstat(file).st_size)
    os.umask(0o022)
    os.mkdir("tree")
    for number in range(40):
        with open(f"tree/{number}", "w") as made:
            made.write(f"number {number}")
        os.chmod(f"tree/{number}", 0o444)
    sizes = "find copy there -type f -printf '%p %m %s\\n' | sort | cksum"
    os.system(f"cp -r tree copy; cp -a tree copy2; mkdir there; tar -cf - tree | tar -xf - -C there; {sizes}")
    os.system(
        "cat there/tree/7 copy2/9; cd there; git init -q; git add . 2>&1; git fsck; find .git/objects -type f | wc -l"
    )
    os.system("cd there; rm -r tree; git checkout -q .; cat tree/* | cksum; install -m 400 tree/3 x; cat x")


def drops_capabilities() -> None:
    begin()
    file, writes = opened()
    import ctypes

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    header = Header(0x20080522, 0)
    print(ctypes.CDLL(None).capset(ctypes.byref(header), (ctypes.c_uint32 * 6)()))
    use(file, writes)


if len(sys.argv) > 1:
    globals()[sys.argv[1]]()
    sys.exit()
for what in (gives_up_all, gives_up_effective, drops_capabilities):
    print(what.__name__, in_child(what))
    print(open("kept").read())
    os.unlink("kept")
sh("mkdir -m 777 user; cp known secret user; chmod 600 user/secret; chown 1000 user/known")
ORDINARY = ("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", sys.executable, __file__)
os.chdir("user")
for name in ("makes_read_only", "loses_the_way", "loses_mode"):
    print(name, subprocess.run([*ORDINARY, name], check=False).returncode)
print(open("kept").read())
os.chdir(HERE)
# A program that runs as another user from the start, with what it inherits.
inherited = os.open("secret", os.O_RDONLY)
os.read(inherited, 3)
done = subprocess.run(
    ["setpriv", "--reuid=1000", "--clear-groups", "cat"], stdin=inherited, capture_output=True, check=False
)
print(done.stdout, done.stderr, sys.version_info.major)
