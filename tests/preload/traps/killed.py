"""Processes and threads that end in the middle leave all that they were told was written."""

import os
import signal
import threading

from trap import begin, in_child, sh

begin()


def written(name: str, count: int, size: int) -> None:
    file = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    for number in range(count):
        assert os.write(file, b"%06d" % number + b"x" * (size - 6)) == size
    os.kill(os.getpid(), signal.SIGKILL)


for turn in range(4):
    for count, size in ((1, 10), (10, 100), (200, 4096), (3, 100_000), (500, 37)):
        print(in_child(lambda count=count, size=size: (begin(), written("killed", count, size))))
        data = open("killed", "rb").read()
        print(len(data) == count * size == int(sh("stat -c %s killed")))
        print(all(data[at * size : at * size + 6] == b"%06d" % at for at in range(count)))


def mixed() -> None:
    begin()
    file = os.open("mixed", os.O_CREAT | os.O_RDWR)
    for number in range(64):
        os.pwrite(file, b"%04d" % number, number * 100)
    os.ftruncate(file, 3203)
    os.rename("mixed", "other")
    os.write(file, b"begin")
    os.kill(os.getpid(), signal.SIGKILL)


print(in_child(mixed), sh("cksum other; ls mixed 2>&1"))


def many(name: str, total: list[int]) -> None:
    file = os.open(name, os.O_CREAT | os.O_WRONLY)
    for _ in range(300):
        total.append(os.write(file, b"of a thread\n"))
    # It stays open, as those of threads that end do.


for turn in range(3):
    totals: list[list[int]] = [[] for _ in range(4)]
    threads = [threading.Thread(target=many, args=(f"t{at}", total)) for at, total in enumerate(totals)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print([os.stat(f"t{at}").st_size == sum(total) for at, total in enumerate(totals)], sh("cat t? | wc"))


def dies_with_threads() -> None:
    begin()
    sizes: list[list[int]] = [[] for _ in range(3)]
    threads = [threading.Thread(target=many, args=(f"d{at}", size)) for at, size in enumerate(sizes)]
    for thread in threads:
        thread.start()
    while len(sizes[0]) < 20:
        pass
    os.write(told, repr([sum(size) for size in sizes]).encode())
    os.kill(os.getpid(), signal.SIGKILL)


reading, told = os.pipe()
for turn in range(3):
    print(in_child(dies_with_threads))
    least = eval(os.read(reading, 1000))
    print(all(os.stat(f"d{at}").st_size >= size for at, size in enumerate(least) if size))
    sh("rm -f d?")
