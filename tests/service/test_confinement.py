"""What a worker can and cannot do, and whose files it makes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import UID_BASE, Keeper

# CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP
_CAPABILITIES = f"{0b1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31:016x}"


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    started = Keeper(isolated)
    yield started
    started.close()


@pytest.fixture
def data(isolated: Isolated) -> Path:
    path = isolated.directory / "data"
    path.mkdir()
    return path


def status_of(keeper: Keeper, pid: int) -> dict[str, str]:
    lines = keeper.place.run("cat", f"/proc/{pid}/status").stdout.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_the_walls_around_a_worker(keeper: Keeper, data: Path) -> None:
    keeper.mount(data, keeper.place.directory / "mnt")
    keeper.place.run("touch", keeper.place.directory / "mnt" / "x")
    worker = keeper.inner_pid("worker_pid")
    status = status_of(keeper, worker)
    assert status["Uid"].split() == [str(UID_BASE)] * 4
    assert status["Gid"].split() == [str(UID_BASE)] * 4
    assert status["Groups"] == ""
    for which in ("CapPrm", "CapEff", "CapBnd"):
        assert status[which] == _CAPABILITIES
    assert status["CapInh"] == status["CapAmb"] == "0" * 16
    assert status["NoNewPrivs"] == "1"
    assert (status["Seccomp"], status["Seccomp_filters"]) == ("2", "2")
    assert status["NSpid"].split()[1] == "1"

    run = keeper.place.run
    # Every thread, the door's too.
    threads = run("sh", "-c", f"cat /proc/{worker}/task/*/status").stdout.splitlines()
    assert {line.split()[1] for line in threads if line.startswith("Seccomp:")} == {"2"}
    assert {line.split()[1] for line in threads if line.startswith("CapEff:")} == {_CAPABILITIES}

    assert run("ls", "-A", f"/proc/{worker}/root/").stdout == ""
    assert "Read-only" in run("touch", f"/proc/{worker}/root/x", check=False).stderr
    mounts = run("cat", f"/proc/{worker}/mountinfo").stdout.splitlines()
    assert len(mounts) == 1 and " / / ro,nosuid,nodev,noexec" in mounts[0] and " - tmpfs " in mounts[0]
    for namespace in ("mnt", "net", "ipc", "uts", "pid", "user", "cgroup"):
        mine = run("readlink", f"/proc/self/ns/{namespace}").stdout
        assert run("readlink", f"/proc/{worker}/ns/{namespace}").stdout != mine, namespace
    assert run("cat", f"/proc/{worker}/uid_map").stdout.split() == ["0", str(UID_BASE), "65536"]
    interfaces = run("cat", f"/proc/{worker}/net/dev").stdout.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] in (["lo"], [])
    opened = run("sh", "-c", f"for f in /proc/{worker}/fd/*; do readlink $f; done").stdout.splitlines()
    host_files = [name for name in opened if name.startswith("/") and name not in ("/dev/null", "/dev/fuse")]
    # Names within what was handed over; the host's paths are not known there.
    assert not [name for name in host_files if str(keeper.place.directory) in name], opened
    assert "Max core file size        0                    0" in run("cat", f"/proc/{worker}/limits").stdout


def test_directories_are_handed_over_as_little_as_needed(keeper: Keeper, data: Path) -> None:
    """A read-only layer cannot be written even by a worker that ignores its stack."""
    mnt = keeper.place.directory / "mnt"
    keeper.mount(data, mnt, read_only=True)
    worker = keeper.inner_pid("worker_pid")
    infos = keeper.place.run("sh", "-c", f"cat /proc/{worker}/fdinfo/*").stdout
    assert "mnt_id" in infos
    # Entered from outside, with all of root's might: the copy of the mount itself refuses.
    find_root = (
        f'for f in /proc/{worker}/fd/*; do [ -d "$f/." ] && [ "$(stat -c %i $f/.)" = {data.stat().st_ino} ]'
    )
    done = keeper.place.run("sh", "-c", f"{find_root} && touch $f/x; done; true")
    assert "Read-only file system" in done.stderr
    assert list(data.iterdir()) == []


def test_owners_are_those_that_programs_see(keeper: Keeper, data: Path) -> None:
    mnt = keeper.place.directory / "mnt"
    keeper.mount(data, mnt)
    script = """
        set -e
        cd "$1"
        echo a >root; echo b >other; chown 33:44 other; chmod 6755 other; mkdir dir; chown 65535:1000 dir
        setpriv --reuid=1000 --regid=1000 --clear-groups sh -c 'echo c >dir/mine' 2>&1 | grep -o denied
        chmod 1777 dir
        setpriv --reuid=1000 --regid=1001 --clear-groups sh -c 'umask 022; echo c >dir/mine'
        cp /bin/true true; setcap cap_net_raw+ep true; getcap true
        mkfifo fifo; ln -s x link; chown -h 5:6 link
    """
    said = keeper.place.run("sh", "-c", script, "sh", mnt).stdout
    assert said == "denied\ntrue cap_net_raw=ep\n"
    shape = {p.name: (p.lstat().st_uid, p.lstat().st_gid, oct(p.lstat().st_mode)) for p in data.rglob("*")}
    assert shape == {
        "root": (0, 0, "0o100644"),
        "other": (33, 44, "0o106755"),
        "dir": (65535, 1000, "0o41777"),
        "mine": (1000, 1001, "0o100644"),
        "true": (0, 0, "0o100755"),
        "fifo": (0, 0, "0o10644"),
        "link": (5, 6, "0o120777"),
    }
    assert (
        "Operation not permitted"
        in keeper.place.run("mknod", mnt / "null", "c", "1", "3", check=False).stderr
    )


def test_a_filesystem_that_cannot_be_idmapped_is_served_all_the_same(keeper: Keeper) -> None:
    place = keeper.place
    directory = place.directory
    for name in ("lower", "upper", "work", "merged", "mnt"):
        (directory / name).mkdir()
    (directory / "lower" / "file").write_text("content\n")
    options = f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work"
    place.run("mount", "-t", "overlay", "overlay", "-o", options, directory / "merged")
    first = keeper.inner_pid("worker_pid")
    keeper.mount(directory / "merged", directory / "mnt")
    place.run("sh", "-c", 'cd "$1"; echo x >new; chown 33:44 new file', "sh", directory / "mnt")
    for name in ("new", "file"):
        found = (directory / "upper" / name).stat()
        assert (found.st_uid, found.st_gid) == (33, 44)
    assert "cannot be idmapped" in keeper.log.read_text()
    pids = place.run("pgrep", "-f", "polytropo-service worker").stdout.split()
    others = [int(pid) for pid in pids if int(pid) != first]
    assert len(others) == 1
    status = status_of(keeper, others[0])
    assert status["Uid"].split()[0] == "0" and status["CapEff"] == _CAPABILITIES and status["Seccomp"] == "2"
    assert place.run("ls", "-A", f"/proc/{others[0]}/root/").stdout == ""
