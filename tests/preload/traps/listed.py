"""Listings while names come and go, also by others, and positions in them."""

import os
import subprocess
import sys

from trap import UNAWARE, begin, in_child, sh

CHANGER = """
import os, sys
for turn in range(int(sys.argv[1])):
    for number in range(20):
        open(f"many/come{turn}-{number}", "w").close()
    for number in range(20):
        os.unlink(f"many/come{turn}-{number}")
"""
begin()
os.mkdir("many")
STAY = sorted(f"stay{number}" for number in range(300))
for name in STAY:
    open(f"many/{name}", "w").close()
for environment in (os.environ, UNAWARE):
    changer = subprocess.Popen([sys.executable, "-c", CHANGER, "20"], env=environment)
    looks = 0
    while looks < 20 or changer.poll() is None:
        names = os.listdir("many")
        stay = sorted(name for name in names if name.startswith("stay"))
        if stay != STAY or len(set(names)) != len(names):
            print("wrong", len(stay), len(names))
        looks += 1
    print(changer.wait(), sorted(os.listdir("many")) == STAY)
for turn in range(20):
    print(len(os.listdir("many")), sum(entry.is_file() for entry in os.scandir("many")))
    open(f"many/own{turn}", "w").close()
    os.unlink(f"many/{STAY[turn]}")
    sh(f"echo >many/theirs{turn}; rm many/{STAY[-1 - turn]}")
    print(
        f"own{turn}" in os.listdir("many"),
        f"theirs{turn}" in os.listdir("many"),
        STAY[turn] in os.listdir("many"),
    )
    print(os.path.exists(f"many/theirs{turn}"), os.path.exists(f"many/{STAY[-1 - turn]}"))
open_directory = os.open("many", os.O_RDONLY)
first = os.listdir(open_directory)
print(len(first), len(os.listdir(open_directory)), in_child(lambda: print(len(os.listdir(open_directory)))))
for entry in list(os.scandir("many")):
    os.unlink(entry.path)
print(os.listdir("many"), os.rmdir("many"))
print(sh("find . -name 'n*' | sort"), sorted(path for path, _, _ in os.walk(".")))
