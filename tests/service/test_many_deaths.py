"""Programs work for minutes on stacks whose workers are killed again and again, and find nothing wrong."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper
from tests.stacks import PRIVATE, WRITING_BACK, document, fill

REPOSITORY = Path(__file__).resolve().parents[2]
# Seconds; ten minutes unless said otherwise.
DURATION_S = float(os.environ.get("POLYTROPO_DEATHS_S", "600"))
# What a round of the slowest program may take beyond that on a busy machine.
GRACE_S = 120
ORDINARY_UID = 1

_ROUNDS = """
set -euo pipefail
end=$((SECONDS + $1)); rounds=0
export GIT_AUTHOR_NAME=t GIT_AUTHOR_EMAIL=t@example.org GIT_COMMITTER_NAME=t GIT_COMMITTER_EMAIL=t@example.org
while [ $SECONDS -lt $end ]; do
    mkdir round && cd round
    BODY
    cd .. && rm -r round
    rounds=$((rounds + 1))
done
echo $rounds
"""

_GIT = """
git init -q -b main project && cd project
for d in $(seq 8); do mkdir -p src/$d; for f in $(seq 20); do echo "$d $f" >src/$d/$f.c; done; done
git add . && git commit -qm one
for d in $(seq 1 2 8); do for f in $(seq 20); do echo changed >>src/$d/$f.c; done; done
git mv src/2 moved && git add . && git commit -qm two
git checkout -q -b old HEAD~1 && git checkout -q main
test -z "$(git status --porcelain)"
cd .. && git clone -q project copy && git -C copy gc -q && git -C copy fsck --strict --full 2>&1
diff -r --exclude=.git project copy
"""

_TAR = """
mkdir -p tree/deep/er
head -c 3000000 /dev/urandom >tree/random; printf x >tree/small; : >tree/empty
truncate -s 5M tree/sparse; printf end | dd of=tree/sparse bs=1 seek=3M conv=notrunc status=none
ln tree/random tree/deep/hard; ln -s ../random tree/deep/soft; mkfifo tree/fifo
chmod 4711 tree/small; chmod 2775 tree/deep; setfattr -n user.colour -v blue tree/random
for n in $(seq 300); do echo $n >tree/deep/er/$n; done
tar --xattrs --sparse -cf tree.tar tree && mkdir back && tar --xattrs --sparse -xpf tree.tar -C back
rsync -aHAXn --checksum --delete --itemize-changes tree/ back/tree/ >difference
test ! -s difference || { cat difference; exit 1; }
"""

_DATABASE = """
import sqlite3, sys, time
end, rounds = time.monotonic() + float(sys.argv[1]), 0
for mode in ("WAL", "DELETE"):
    database = sqlite3.connect(mode, isolation_level=None)
    database.execute("PRAGMA journal_mode=" + mode)
    database.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, half INTEGER, text TEXT)")
    database.close()
while time.monotonic() < end:
    for mode in ("WAL", "DELETE"):
        database = sqlite3.connect(mode, isolation_level=None, timeout=60)
        try:
            for number in range(30):
                database.execute("BEGIN IMMEDIATE")
                for half in (1, 2):
                    row = (half, "x" * 37 * number)
                    database.execute("INSERT INTO orders (half, text) VALUES (?, ?)", row)
                database.execute("COMMIT")
        except sqlite3.Error as error:
            sys.exit(f"{mode}, after {rounds} rounds and {number}: {error.sqlite_errorname}")
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        for half in (1, 2):
            count = "SELECT count(*) FROM orders WHERE half=?"
            assert database.execute(count, (half,)).fetchone() == (30 * (rounds + 1),)
        database.close()
    rounds += 1
print(rounds)
"""

_FILES = """
import hashlib, os, random, sys, time
end, rounds, dice, known = time.monotonic() + float(sys.argv[1]), 0, random.Random(5), {}
kept = open("kept", "w+b", buffering=0)
bytes_kept = bytearray(1 << 20)
kept.truncate(len(bytes_kept))
while time.monotonic() < end:
    name = f"file{dice.randrange(200)}"
    content = dice.randbytes(dice.randrange(1 << dice.randrange(1, 21)))
    with open("new", "wb") as file:
        file.write(content)
        if dice.random() < 0.5:
            file.flush()
            os.fsync(file.fileno())
    os.rename("new", name)
    known[name] = hashlib.sha256(content).digest()
    if dice.random() < 0.2:
        gone = dice.choice(sorted(known))
        os.unlink(gone)
        del known[gone]
    for name in dice.sample(sorted(known), min(len(known), 5)):
        with open(name, "rb") as file:
            assert hashlib.file_digest(file, "sha256").digest() == known[name], name
    assert sorted(os.listdir(".")) == sorted([*known, "kept"])
    # A file that stays open throughout.
    for _ in range(20):
        offset, piece = dice.randrange(len(bytes_kept)), dice.randbytes(dice.randrange(9000))
        piece = piece[: len(bytes_kept) - offset]
        assert os.pwrite(kept.fileno(), piece, offset) == len(piece)
        bytes_kept[offset : offset + len(piece)] = piece
    assert os.pread(kept.fileno(), len(bytes_kept), 0) == bytes_kept
    rounds += 1
print(rounds)
"""


_BUILD = """
for n in $(seq 12); do
    printf '#include "all.h"\\nint f%d(int x) { return x + %d; }\\n' $n $n >f$n.c
    echo "int f$n(int);" >>all.h
done
{ echo '#include "all.h"'; echo 'int main(void) { int x = 0;'; for n in $(seq 12); do echo "x = f$n(x);"; done
  echo 'return x != 78; }'; } >main.c
for file in *.c; do gcc -O1 -c $file; done
ar rcs lib.a f*.o && gcc -o program main.o lib.a && ./program
"""


class Program:
    """Works in a directory of its own on the mount until its time is over, then prints how many rounds."""

    def __init__(
        self,
        place: Isolated,
        name: str,
        directory: Path,
        words: list[str],
        ordinary: bool,
        variables: Mapping[str, str],
    ) -> None:
        place.run("mkdir", directory)
        identity: list[str] = []
        if ordinary:
            place.run("chown", f"{ORDINARY_UID}:{ORDINARY_UID}", directory)
            identity = ["setpriv", f"--reuid={ORDINARY_UID}", f"--regid={ORDINARY_UID}", "--clear-groups"]
        settings = [f"--chdir={directory}", f"HOME={directory}", f"TMPDIR={directory}"]
        settings += [f"{variable}={value}" for variable, value in variables.items()]
        self.name, self.said = name, ""
        self.process = subprocess.Popen(
            place.command(*identity, "env", *settings, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=place.environment,
        )

    def is_running(self) -> bool:
        """If not, it has ended well."""
        if self.process.poll() is None:
            return True
        if self.process.stdout is not None and not self.process.stdout.closed:
            self.said = self.process.communicate()[0]
        assert self.process.returncode == 0, f"{self.name} ended with {self.process.returncode}\n{self.said}"
        return False

    def rounds(self) -> int:
        return int(self.said.split()[-1])


def programs(place: Isolated, mnt: Path, variables: Mapping[str, str]) -> list[Program]:
    """Half of them are an ordinary user's."""
    seconds = str(int(DURATION_S))

    def shell(body: str) -> list[str]:
        return ["bash", "-c", _ROUNDS.replace("BODY", body), "rounds", seconds]

    started = {
        "git": (shell(_GIT), True),
        "tar": (shell(_TAR), False),
        "build": (shell(_BUILD), True),
        "database": (["python3", "-c", _DATABASE, seconds], True),
        "files": (["python3", "-c", _FILES, seconds], False),
    }
    return [
        Program(place, name, mnt / name, words, ordinary, variables)
        for name, (words, ordinary) in started.items()
    ]


def preloaded(place: Isolated, keeper: Keeper, mnt: Path, library: Path) -> dict[str, str]:
    copy = place.directory / "preload.so"
    shutil.copy(library, copy)
    copy.chmod(0o755)
    channel = keeper.run_dir / "channel/channel.sock"
    return {"LD_PRELOAD": str(copy), "POLYTROPO_CHANNEL": str(channel), "POLYTROPO_MOUNT": str(mnt)}


@pytest.mark.soak
@pytest.mark.timeout(DURATION_S + 2 * GRACE_S)
@pytest.mark.parametrize("kind", ["dir", "union", WRITING_BACK, f"{PRIVATE}dir", f"{PRIVATE}union"])
def test_programs_find_nothing_wrong(isolated: Isolated, library: Path, kind: str) -> None:
    keeper, mnt, below = (
        Keeper(isolated, arguments=["--restarts=1000"]),
        isolated.directory / "mnt",
        isolated.directory / "below",
    )
    stack = document(kind, below)
    if not kind.endswith("dir"):
        (isolated.directory / "plain").mkdir()
        fill(below / "low", below / "lowest", isolated.directory / "plain")
    for directory in (below, *below.iterdir()):
        directory.chmod(0o755)
    mnt.mkdir()
    keeper.do("mount", stack=stack, mountpoint=str(mnt))
    keeper.run_dir.chmod(0o711)
    variables = preloaded(isolated, keeper, mnt, library) if kind.startswith(PRIVATE) else {}
    started = programs(isolated, mnt, variables)
    dice, kills, end = random.Random(kind), 0, time.monotonic() + DURATION_S
    try:
        while running := [program.name for program in started if program.is_running()]:
            assert time.monotonic() < end + GRACE_S, f"these do not end: {running}"
            time.sleep(dice.choice((0.05, 0.3, 1, 3)) * dice.random())
            # The last rounds end in peace; the keeper hangs up on who says nothing for long.
            if time.monotonic() < end:
                kills += keeper.kill_worker() is not None
            else:
                keeper.do("status")
    finally:
        # Shown when the test fails.
        print(f"{kills} kills\n{keeper.log.read_text()[-50_000:]}")
    rounds = {program.name: program.rounds() for program in started}
    print(rounds)
    assert kills > DURATION_S / 5 and min(rounds.values()) > 0
    assert keeper.mounts()[0]["dead"] is False
    keeper.do("unmount", mountpoint=str(mnt))
    keeper.close()
