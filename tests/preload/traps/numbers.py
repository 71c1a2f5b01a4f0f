"""Who looks at all numbers of descriptors, or closes them all, finds its own and no others."""

import os
import resource
import subprocess

from trap import attempt, begin, in_child

begin()


def numbers() -> list[int]:
    """Those in /proc that are open: the library's are none of the program's."""
    found = sorted(map(int, os.listdir("/proc/self/fd")))
    return [number for number in found if isinstance(attempt(os.fstat, number), os.stat_result)]


def highest(of: range) -> list[int]:
    return [number for number in of if isinstance(attempt(os.get_inheritable, number), bool)]


files = [os.open("known", os.O_RDONLY), os.open("made", os.O_CREAT | os.O_RDWR)]
for turn in range(3):
    print(numbers(), highest(range(1024)))
    print(
        attempt(os.dup, 512), attempt(os.read, 513, 1), attempt(os.lseek, 514, 0, 1), attempt(os.close, 515)
    )
    print(attempt(os.dup2, 512, 700), attempt(os.fstat, 700))
    print(os.read(files[0], 3), os.write(files[1], b"x"))
    os.dup2(files[0], 600)
    print(os.read(600, 3), numbers())
    os.close(600)
    more = [os.open("known", os.O_RDONLY) for _ in range(100)]
    print(more == list(range(more[0], more[0] + 100)), [os.read(file, 2) for file in more[::30]])
    for file in more:
        os.close(file)
SCRIPT = """
import os
from trap import attempt
print([number for number in range(1024) if isinstance(attempt(os.fstat, number), os.stat_result)])
"""
for close in (True, False):
    done = subprocess.run(["python3", "-c", SCRIPT], close_fds=close, capture_output=True, check=False)
    print(done.stdout, done.stderr)
print(subprocess.run(["python3", "-c", SCRIPT], pass_fds=[files[0]], capture_output=True, check=False).stdout)


def daemon() -> None:
    """Closes all, one by one, as daemons do, and begins anew."""
    for number in range(3, 4096):
        attempt(os.close, number)
    file = os.open("known", os.O_RDONLY)
    print(file, os.read(file, 5), numbers())
    begin()
    file = os.open("made", os.O_RDWR | os.O_APPEND)
    print(file, os.write(file, b"daemon"), numbers())


print(in_child(daemon), open("made").read())


def full() -> None:
    """Without a number nothing is made, and nothing cut."""
    begin()
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    while isinstance(refused := attempt(os.open, "known", os.O_RDONLY), int):
        pass
    for name, flags in ("never", os.O_CREAT), ("never", os.O_CREAT | os.O_EXCL), ("made", os.O_TRUNC):
        print(name, refused, attempt(os.open, name, flags | os.O_WRONLY))
    print(os.path.exists("never"), os.path.getsize("made"))
    os.closerange(20, 40)
    made: list[int] = []
    while isinstance(file := attempt(os.open, f"new{len(made)}", os.O_CREAT | os.O_RDWR), int):
        made.append(file)
    # The kernel is told what they are, or that it cannot be.
    print(len(made), {attempt(os.fchdir, file) in ("Not a directory", refused) for file in made})


print(in_child(full))
os.closerange(3, 2000)
print(numbers(), os.open("known", os.O_RDONLY))
begin()
file = os.open("made", os.O_RDWR)
print(file, os.read(file, 9), highest(range(2000)))
