"""Readiness of our files, as of all regular ones, alone and among others."""

import os
import select

from trap import attempt, begin

begin()
for turn in range(3):
    reads, writes = os.open("known", os.O_RDONLY), os.open("written", os.O_CREAT | os.O_RDWR)
    pipe, other_end = os.pipe()
    print(select.select([reads, pipe], [writes], [reads], 0) == ([reads], [writes], []))
    poll = select.poll()
    for descriptor in (reads, writes, pipe):
        poll.register(descriptor)
    print(sorted(poll.poll(0)) == sorted([(reads, 5), (writes, 5)]))
    os.write(other_end, b"x")
    print([event for descriptor, event in poll.poll(0) if descriptor == pipe])
    with select.epoll() as watch:
        # FUSE lets regular files in (SEMANTICS.md), other filesystems do not.
        attempt(watch.register, reads), attempt(watch.register, writes), attempt(watch.register, pipe)
        print([event for descriptor, event in watch.poll(0) if descriptor == pipe])
    print(
        os.read(reads, 4), os.write(writes, b"after"), os.get_blocking(reads), os.set_blocking(reads, False)
    )
    print(os.get_blocking(reads), os.read(reads, 4))
    for descriptor in (reads, writes, pipe, other_end):
        os.close(descriptor)
file = os.open("known", os.O_RDONLY)
print(select.select([file], [], [], 0) == ([file], [], []))
os.close(file)
print(attempt(select.select, [file], [], [], 0))
