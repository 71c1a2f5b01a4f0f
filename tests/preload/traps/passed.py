"""Descriptors travel to other processes, which use the same open files."""

import array
import ctypes
import os
import socket
import subprocess
import sys

from trap import UNAWARE, begin, in_child

RECEIVER = """
import array, os, socket, sys
here = socket.socket(fileno=int(sys.argv[1]))
for _ in range(40): os.close(os.open("known", os.O_RDONLY))
while True:
    _, ancillary, _, _ = here.recvmsg(1, socket.CMSG_SPACE(8))
    if not ancillary: break
    reads, writes = array.array("i", ancillary[0][2])
    os.write(writes, b"received " + os.read(reads, 6) + b" ")
    here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reads, writes]))])
    os.close(reads), os.close(writes)
"""
begin()
for name, environment in (("aware", os.environ), ("unaware", UNAWARE)):
    here, there = socket.socketpair()
    words = [sys.executable, "-c", RECEIVER, str(there.fileno())]
    receiver = subprocess.Popen(words, pass_fds=[there.fileno()], env=environment)
    there.close()
    for turn in range(5):
        reads, writes = os.open("known", os.O_RDONLY), os.open("sent", os.O_CREAT | os.O_TRUNC | os.O_RDWR)
        print(name, os.read(reads, 3), os.write(writes, b"sent "))
        handles = array.array("i", [reads, writes])
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handles)])
        if turn % 2:
            os.close(reads)
            os.close(writes)
        ancillary = here.recvmsg(1, socket.CMSG_SPACE(8))[1]
        own, back = array.array("i", bytes(ancillary[0][2]))
        print(os.read(own, 3), os.write(back, b"back"), os.pread(back, 50, 0))
        if turn % 2 == 0:
            print(os.read(reads, 3), os.lseek(writes, 0, os.SEEK_CUR))
        for descriptor in {own, back} | ({reads, writes} if turn % 2 == 0 else set()):
            os.close(descriptor)
    here.close()
    print(receiver.wait())
# multiprocessing's way, and a descriptor taken from a child.
here, there = socket.socketpair()


def child() -> None:
    file = os.open("known", os.O_RDONLY)
    os.read(file, 10)
    socket.send_fds(there, [b"x"], [file])
    print(os.read(file, 3))


print(in_child(child))
received = socket.recv_fds(here, 1, 1)[1]
print(os.read(received[0], 3))
process = subprocess.Popen(["sleep", "60"], stdin=os.open("known", os.O_RDONLY))
handle = os.pidfd_open(process.pid)
taken = ctypes.CDLL(None).syscall(438, handle, 0, 0)
print(os.read(taken, 4), process.kill(), process.wait())
