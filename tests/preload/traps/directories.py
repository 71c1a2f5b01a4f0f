"""Paths from the working directory, from descriptors, up and around."""

import os

from trap import attempt, begin, in_child, sh

begin()
os.makedirs("a/b/c")
for path in ("a/file", "a/b/file", "a/b/c/file"):
    with open(path, "w") as file:
        file.write(path)
os.symlink("b/c", "a/link")
os.symlink("../../known", "a/b/up")
os.symlink(os.path.abspath("known"), "absolute")
os.symlink("loop", "loop")
handles = {path: os.open(path, os.O_RDONLY) for path in (".", "a", "a/b", "a/b/c")}
PATHS = (
    "file",
    "c/file",
    "../file",
    "link/file",
    "link/../file",
    "up",
    "./",
    "..",
    "nothing",
    "file/",
    "file/x",
    "../../known",
    "",
)


def look(path: str, directory: int | None = None) -> object:
    def opened() -> object:
        file = os.open(path, os.O_RDONLY, dir_fd=directory)
        try:
            return os.read(file, 30) if not os.path.isdir(f"/proc/self/fd/{file}") else "directory"
        finally:
            os.close(file)

    def status() -> object:
        found = os.stat(path, dir_fd=directory)
        return found.st_mode, found.st_size if not os.path.isdir(path) else 0

    def link() -> object:
        return os.readlink(path, dir_fd=directory)

    return attempt(opened), attempt(status), attempt(link)


for turn in range(4):
    for place, handle in handles.items():
        for path in PATHS:
            print(place, path, look(path, handle))
    for place, handle in handles.items():
        os.chdir(place) if turn % 2 else os.fchdir(handle)
        print(os.path.basename(os.getcwd()))
        for path in PATHS:
            print(path, look(path))
        made = os.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(made, b"new")
        print(open("new").read(), sorted(os.listdir()))
        os.unlink("new")
        os.fchdir(handles["."])
    print(in_child(lambda: (os.chdir("a"), print(open("file").read()))), open("known").read()[:3])
    sh("mv a moved; mkdir a; echo other >a/file")
    print(look("file", handles["a"]), look("a/file"), look("moved/file"))
    sh("rm -r a; mv moved a")
for path in ("absolute", "loop", "a/link/file", "a//b///file", "./a/./b/../file", "known/", "a/b/up"):
    print(path, look(path), attempt(os.open, path, os.O_RDONLY | os.O_NOFOLLOW) in range(1000))
print(
    attempt(os.open, "a", os.O_WRONLY),
    attempt(os.open, "known", os.O_DIRECTORY),
    attempt(os.open, "n" * 256, 0),
)
print(
    attempt(os.open, "a", os.O_RDONLY | os.O_CREAT),
    attempt(os.open, "x" * 5000, 0),
    look("file", os.open("known", 0)),
)
