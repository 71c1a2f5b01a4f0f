"""Several processes append to one file, preloaded and not, and no line is torn or lost."""

import os
import subprocess
import sys

from trap import UNAWARE, begin

WRITER = """
import os, sys
file = os.open("together", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for _ in range(60): os.close(os.open("known", os.O_RDONLY))
for number in range(200):
    line = b"%s %d %s\\n" % (sys.argv[1].encode(), number, b"x" * (number % 90))
    assert os.write(file, line) == len(line)
    if number % 50 == 0:
        os.close(file)
        file = os.open("together", os.O_WRONLY | os.O_APPEND)
"""
begin()
ways = [("aware", os.environ), ("unaware", UNAWARE), ("aware-too", os.environ)]
writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], env=env) for name, env in ways]
shell = "i=0; while [ $i -lt 100 ]; do echo shell $i >>together; i=$((i+1)); done"
writers.append(subprocess.Popen(["sh", "-c", shell]))
print([writer.wait() for writer in writers])
with open("together") as file:
    lines = file.read().splitlines()
print(len(lines))
for name, *_ in ways:
    own = [line.split() for line in lines if line.split()[0] == name]
    print(name, [int(words[1]) for words in own] == list(range(200)))
    print(all(len([*words, ""][2]) == int(words[1]) % 90 for words in own))
print([line for line in lines if line.startswith("shell")] == [f"shell {number}" for number in range(100)])
# Two descriptors of one process, and one that is inherited.
first = os.open("both", os.O_CREAT | os.O_RDWR | os.O_APPEND)
second = os.open("both", os.O_WRONLY | os.O_APPEND)
for turn in range(5):
    os.write(first, b"first ")
    os.write(second, b"second ")
    # Where the first one stands is told otherwise (SEMANTICS.md), since somebody else has appended.
    print(os.lseek(second, 0, os.SEEK_CUR))
    print(os.pwrite(first, b"P", 0), os.fstat(second).st_size)
    subprocess.run(["sh", "-c", f"echo third >&{first}"], pass_fds=[first], check=True)
with open("both") as file:
    print(file.read())
# What others append after the own write is read next, by a program that has the service open its files.
READER = """
import os
from trap import begin, sh
begin()
mine = os.open("mine", os.O_CREAT | os.O_RDWR | os.O_APPEND)
for turn in range(3):
    os.write(mine, b"mine ")
    with open("mine", "a") as other:
        other.write("other ")
    sh("printf 'shell ' >>mine")
    print(os.read(mine, 100), os.lseek(mine, 0, os.SEEK_CUR))
    os.lseek(mine, 0, os.SEEK_SET)
    print(os.read(mine, 4))
"""
print(subprocess.run([sys.executable, "-c", READER], stdout=subprocess.PIPE, text=True).stdout)
