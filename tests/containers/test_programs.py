"""Real programs in containers as they are by default: preloaded, and what they print is the same without."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated, machine
from tests.containers import host_image

_PROGRAMS = [
    "cut",
    "expr",
    "git",
    "gzip",
    "ln",
    "mktemp",
    "redis-cli",
    "redis-server",
    "seq",
    "tar",
    "touch",
    "tr",
]
_TRACE = "/tmp/trace"

GIT = """
git init -q repo && cd repo && git config user.email a@localhost && git config user.name a
for i in $(seq 40); do echo $i >f$i; done
git add . && git commit -qm one && git checkout -qb other && rm f1 && echo more >>f2 && git commit -qam two
git checkout -q - && git merge -q other && git repack -qad && git fsck --strict &&
git clone -q -u "git upload-pack" . ../copy
git log --format=%s && git status --porcelain && cat ../copy/f2 && ls ../copy | wc -l
"""
REDIS = """
start() {
    redis-server --daemonize yes --dir /tmp --unixsocket /tmp/redis --port 0 --appendonly yes --save '' >log
    until redis-cli -s /tmp/redis ping >/dev/null 2>&1; do sleep 0.05; done
}
start
for i in $(seq 30); do echo "rpush list $i"; done | redis-cli -s /tmp/redis >/dev/null
redis-cli -s /tmp/redis bgrewriteaof >/dev/null
redis-cli -s /tmp/redis lrange list 27 -1; redis-cli -s /tmp/redis shutdown; start
redis-cli -s /tmp/redis llen list; redis-cli -s /tmp/redis shutdown
"""
PYTHON = """
python3 - <<'END'
import json, logging, mmap, multiprocessing, os, shutil, subprocess, tempfile
with tempfile.TemporaryDirectory() as place:
    for number in range(50):
        with open(f"{place}/{number}", "w") as file:
            print(number, file=file)
    shutil.copytree(place, f"{place}/copy")
    with multiprocessing.Pool(2) as pool:
        print(sum(pool.map(len, sorted(os.listdir(f"{place}/copy")))))
    with open(f"{place}/1", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0:1] = b"9"
    print(subprocess.check_output(["cat", f"{place}/1"]))
END
"""
SHELL = """
for i in $(seq 15); do
    d=$(mktemp -d) && echo "#define HAVE_$i 1" >$d/conf.c && grep -q HAVE $d/conf.c
    sed s/HAVE/HAS/ $d/conf.c >>all.h && test -s all.h && expr "x$i" : 'x[0-9]*' >>lengths && rm -r $d
done
(echo a; (sleep 0.1; echo b) & wait) >>log && cat log && sort -u lengths && tail -n1 all.h
mkdir tree && cp -a /lib tree && (cd tree && tar cf - .) | gzip | gzip -d | tar xf - -C . && ls | cut -c1-3
cp /bin/true ./runs && ./runs && exec 3<all.h && rm all.h && head -n1 <&3 && perl -e 'print -s "log", "\\n"'
"""


@pytest.fixture(scope="module")
def desk(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Isolated]:
    """A machine with an image of programs of this one."""
    more = {"usr/lib/python3.11": Path("/usr/lib/python3.11")}
    tar = host_image.make(
        tmp_path_factory.mktemp("programs") / "image.tar", [*host_image.PROGRAMS, *_PROGRAMS], more
    )
    with machine() as place:
        place.polytropo("image", "import", tar, "--name", "host")
        yield place


@pytest.mark.timeout(120)
@pytest.mark.parametrize("script", [GIT, REDIS, PYTHON, SHELL], ids=["git", "redis", "python", "shell"])
def test_programs_print_the_same_preloaded_and_not(desk: Isolated, script: str) -> None:
    def printed(*options: str, after: str = "") -> str:
        # Written to a file: some of the programs close what they would tell to.
        trace = ("-e", "POLYTROPO_TRACE=1", "-e", f"POLYTROPO_TRACE_FILE={_TRACE}", "-e", "LC_ALL=C")
        script_in = f"mkdir /tmp/here && cd /tmp/here && set -e\n{script}\n{after}"
        return desk.polytropo("run", "--rm", *options, *trace, "host", "sh", "-c", script_in).stdout

    expected = printed("--no-preload", after=f"test ! -e {_TRACE}")
    shown, _, trace = printed(after=f"echo the trace: && cat {_TRACE}").partition("the trace:\n")
    assert shown == expected
    assert sum(map(int, re.findall(r"in the process (\d+)", trace))) > 0, trace
