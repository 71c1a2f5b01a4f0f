"""Files and directories without a name, or whose name is another's by now."""

import ctypes
import os
import shutil

from trap import attempt, begin, in_child, sh

begin()
secret = attempt(os.open, ".", os.O_TMPFILE | os.O_RDWR, 0o600)
print(os.write(secret, b"secret"), os.pread(secret, 9, 0), os.fstat(secret).st_nlink)
libc = ctypes.CDLL(None)
# os.link cannot: it calls link(2), which never follows.
print(libc.linkat(-100, b"/proc/self/fd/%d" % secret, -100, b"shown", 0x400))
print(open("shown").read(), os.fstat(secret).st_nlink)
place = os.open("known", os.O_PATH)
print(attempt(os.read, place, 1), attempt(os.write, place, b"x"), os.fstat(place).st_size)
print(attempt(os.fchmod, place, 0o600), attempt(os.lseek, place, 0, 0), attempt(os.ftruncate, place, 0))
print(os.read(os.open(f"/proc/self/fd/{place}", os.O_RDONLY), 5))
place = os.open(".", os.O_PATH | os.O_DIRECTORY)
print(
    os.stat("known", dir_fd=place).st_size,
    attempt(os.listdir, place),
    os.read(os.open("known", 0, dir_fd=place), 3),
)
for turn in range(3):
    for kind in ("read", "written", "both"):
        with open("file", "w") as made:
            made.write("old bytes")
        how = {"read": os.O_RDONLY, "written": os.O_WRONLY, "both": os.O_RDWR}[kind]
        file = os.open("file", how)
        if kind != "read":
            print("write", os.write(file, b"OLD"))
        with open("new", "w") as made:
            made.write("new bytes!")
        os.rename("new", "file")
        print(kind, open("file").read(), os.fstat(file).st_nlink, os.fstat(file).st_size)
        print(attempt(os.pread, file, 20, 0), attempt(os.pwrite, file, b"later", 9), os.fstat(file).st_size)
        os.unlink("file")
        print(attempt(os.read, file, 20), attempt(os.write, file, b"gone"), os.path.exists("file"))
        print(in_child(lambda: print(attempt(os.pread, file, 20, 0), attempt(os.write, file, b", child"))))
        print(os.fstat(file).st_size, os.lseek(file, 0, os.SEEK_CUR))
        print(os.readlink(f"/proc/self/fd/{file}").endswith("/file (deleted)"))
        again = attempt(os.open, f"/proc/self/fd/{file}", os.O_RDWR)
        print(attempt(os.pread, again, 40, 0))
        os.close(file)
        os.close(again)
# Made, written and removed at once: what compilers do with temporary files.
for turn in range(20):
    file = os.open(f"t{turn}", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    os.write(file, b"temporary")
    os.unlink(f"t{turn}")
    assert os.pread(file, 9, 0) == b"temporary" and os.fstat(file).st_nlink == 0
    assert attempt(os.open, f"t{turn}", os.O_RDONLY) == "No such file or directory"
    os.close(file)
os.mkdir("d")
os.chdir("d")
outside = os.open("..", os.O_RDONLY)
inside = os.open(".", os.O_RDONLY)
with open("file", "w") as made:
    made.write("x")
for turn in range(3):
    print(os.path.basename(os.getcwd()), os.listdir(inside), os.stat("file").st_size)
os.unlink("file")
os.rmdir("../d")
print(
    attempt(os.getcwd), os.listdir("."), os.listdir(inside), attempt(os.open, "new", os.O_CREAT | os.O_WRONLY)
)
print(
    attempt(os.stat, "known"),
    attempt(os.mkdir, "e"),
    os.fstat(inside).st_nlink,
    attempt(lambda: os.stat("../known").st_size),
)
print(
    sorted(os.listdir(outside))
    == sorted(sh("ls -A", cwd="/proc/self/fd/" + str(outside), pass_fds=[outside]).split())
)
os.chdir(outside)
print(os.stat("known").st_size)
os.mkdir("d")
os.chdir("d")
sh("cd ..; mv d e; mkdir d; echo other >d/file; echo own >e/file")
for turn in range(3):
    print(os.path.basename(os.getcwd()), open("file").read())
sh("rm -r ../e")
print(attempt(os.getcwd), attempt(os.open, "file", os.O_RDONLY), os.listdir())
os.chdir("../d") if os.path.exists("../d") else os.chdir(outside)
shutil.rmtree("../d", ignore_errors=True)
