"""Containers with a read-only root, whose files the kernel reads itself, come and go for minutes."""

import hashlib
import os
import random
import subprocess
import time
from pathlib import Path

import pytest

from polytropo import hostprobe
from tests.conftest import POLYTROPO, Isolated
from tests.containers.conftest import BUSYBOX, leftovers
from tests.images.archives import Layout, config_of, directory, member, symlink, tar

# Seconds; five minutes unless said otherwise.
DURATION_S = float(os.environ.get("POLYTROPO_ROUNDS_S", "300"))
AT_ONCE = 3
FILES = 400
# What keeper or worker may have open more than before: channels and orders that are about to end.
DESCRIPTORS_SPARE = 16

_CHECK = "cd /data && sha256sum -c /sums | grep -c ': OK$'"
# Stays while others come and go.
_STAYS = f"while :; do test $({_CHECK}) = {FILES} || exit 7; done"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Two layers of files below and above the size from which they are passed through."""
    dice = random.Random(3)
    contents = {
        f"data/{number}": dice.randbytes(dice.choice((0, 100, 4096, 70_000))) for number in range(FILES)
    }
    sums = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {Path(name).name}\n" for name, content in contents.items()
    )
    named = list(contents.items())
    base = [directory(name) for name in ("bin", "data", "dev", "etc", "proc", "sys", "tmp")]
    base += [member("bin/busybox", BUSYBOX.read_bytes(), mode=0o755)]
    base += [symlink(f"bin/{name}", "busybox") for name in ("sh", "grep", "sha256sum", "test")]
    base += [member(name, content) for name, content in named[: FILES // 2]]
    top = [member(name, content) for name, content in named[FILES // 2 :]] + [member("sums", sums.encode())]
    layers = [tar(base), tar(top)]
    Layout(tmp_path / "layout").image(layers, config=config_of(layers, Env=["PATH=/bin"]))
    return tmp_path / "layout"


@pytest.mark.soak
@pytest.mark.timeout(DURATION_S + 300)
def test_read_only_roots_come_and_go(isolated: Isolated, layout: Path) -> None:
    if not hostprobe.fuse().passthrough:
        pytest.skip("this kernel has no FUSE passthrough (Linux 6.9 has)")
    isolated.polytropo("image", "import", layout, "--name", "files")
    isolated.polytropo("run", "-d", "--name", "stays", "--read-only", "files", "sh", "-c", _STAYS)
    rounds = f"""
        end=$(($(date +%s) + {int(DURATION_S)})); rounds=0
        while [ $(date +%s) -lt $end ]; do
            found=$({POLYTROPO} run --rm --read-only files sh -c "{_CHECK}")
            [ "$found" = {FILES} ] || {{ echo "$found"; exit 1; }}
            rounds=$((rounds + 1))
        done
        echo $rounds
    """
    before = descriptors(isolated)
    started = [
        subprocess.Popen(
            isolated.command("sh", "-c", rounds),
            env=isolated.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(AT_ONCE)
    ]
    told = [program.communicate(timeout=DURATION_S + 120)[0] for program in started]
    assert [program.returncode for program in started] == [0] * AT_ONCE, told
    (stays,) = isolated.json("ps")
    assert stays["name"] == "stays", "the one that stayed found bytes that are not the image's"
    time.sleep(1)
    after = descriptors(isolated)
    print(f"{sum(map(int, told))} containers; descriptors {before} before, {after} after")
    assert all(int(count) > 1 for count in told)
    assert all(now <= once + DESCRIPTORS_SPARE for now, once in zip(after, before, strict=True))
    isolated.polytropo("rm", "--force", "stays")
    assert leftovers(isolated) == []


def descriptors(machine: Isolated) -> list[int]:
    """How many the keeper has open, and its worker."""
    (stats,) = machine.json("stats")
    pids = (stats["keeper_pid"], stats["worker_pid"])
    return [len(machine.run("ls", f"/proc/{pid}/fd").stdout.split()) for pid in pids]
