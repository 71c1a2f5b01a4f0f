"""Programs of all kinds begin with descriptors that others opened: preloaded, static, setuid, with no environment."""

import os
import shutil
import stat
import subprocess

from trap import attempt, begin, in_child

begin()
shutil.copy("/bin/busybox", "busybox")
shutil.copy("/bin/cat", "privileged")
os.chmod("privileged", 0o4755)
PROGRAMS = {
    "preloaded": ["/bin/cat"],
    "static": ["./busybox", "cat"],
    "privileged": ["./privileged"],
    "without environment": ["/usr/bin/env", "-i", "/bin/cat"],
    "script": ["./script"],
}
with open("script", "w") as file:
    file.write("#!/bin/sh\nread line; echo $line; exec cat\n")
os.chmod("script", 0o755)
for turn in range(2):
    for name, words in PROGRAMS.items():
        reads = os.open("known", os.O_RDONLY)
        writes = os.open("written", os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        print(name, os.write(writes, b"ours, "), os.read(reads, 4))
        done = subprocess.run(words, stdin=reads, stdout=writes, stderr=subprocess.PIPE, check=False)
        print(done.returncode, done.stderr)
        print(os.read(reads, 5), os.lseek(reads, 0, os.SEEK_CUR), os.write(writes, b", ours again"))
        print(os.pread(writes, 200, 0), os.lseek(writes, 0, os.SEEK_CUR))
        os.close(reads)
        os.close(writes)
        # By a number that the child was told; and not one that closes.
        kept, lost = os.open("known", os.O_RDONLY), os.open("known", os.O_RDONLY)
        os.set_inheritable(kept, True)
        os.read(kept, 10)
        script = f"head -c 5 <&{kept}; head -c 5 <&{lost} 2>/dev/null || echo none"
        print(subprocess.run(["sh", "-c", script], pass_fds=[kept], capture_output=True, check=False).stdout)
        print(os.read(kept, 5), os.read(lost, 5))
        os.close(kept)
        os.close(lost)


def becomes_another() -> None:
    """exec without a fork: what was written just now is there, what is open stays so."""
    writes = os.open("left", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    for number in range(100):
        os.write(writes, b"%d " % number)
    os.dup2(os.open("known", os.O_RDONLY), 0)
    os.read(0, 30)
    os.dup2(writes, 1)
    os.execvp("cat", ["cat"])


print(in_child(becomes_another), open("left").read())


def fails_to() -> None:
    writes = os.open("left", os.O_CREAT | os.O_RDWR | os.O_TRUNC)
    os.write(writes, b"before")
    print(attempt(os.execv, "./no such program", ["none"]))
    os.write(writes, b" and after")


print(in_child(fails_to), open("left").read(), stat.filemode(os.stat("privileged").st_mode))
