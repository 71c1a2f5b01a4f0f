"""Orders over the control socket, hostile clients, and the deaths of keeper and worker."""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper, ask, directory_stack, read_line, wait_until


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    started = Keeper(isolated)
    yield started
    started.close()


def our_mount_lines(place: Isolated) -> list[str]:
    table = place.run("cat", "/proc/self/mountinfo").stdout
    return [line for line in table.splitlines() if " fuse.polytropo " in line]


def test_orders_that_are_refused(keeper: Keeper, data: Path) -> None:
    place = keeper.place.directory
    mnt = place / "mnt"
    mnt.mkdir()
    stack = directory_stack(data)

    def refused(stack: object, mountpoint: object) -> tuple[str, str | None]:
        return keeper.refused("mount", stack=stack, mountpoint=str(mountpoint))

    assert refused(stack, "mnt") == ("the mount point mnt is not an absolute path", "EINVAL")
    assert refused(stack, place / "no") == (
        f"the mount point {place}/no does not exist; make it with mkdir",
        "ENOENT",
    )
    assert refused(stack, data / "file") == (f"the mount point {data}/file is not a directory", "ENOTDIR")
    assert refused(directory_stack(data / "no"), mnt) == (f"root.path: {data}/no does not exist", "ENOENT")
    lower = {"kind": "dir", "path": str(data)}
    union = {"version": 1, "root": {"kind": "union", "lowers": [lower, {"kind": "dir", "path": "/no"}]}}
    assert refused(union, mnt) == ("root.lowers[1].path: /no does not exist", "ENOENT")
    union["root"]["upper"] = {"kind": "dir", "path": str(data / "file")}  # type: ignore[index]
    assert refused(union, mnt) == (f"root.upper.path: {data}/file is not a directory", "ENOTDIR")
    sentence, errno = refused({"version": 2, "root": {}}, mnt)
    assert sentence.startswith("stack document: version: is 2, but") and errno == "EINVAL"
    sentence, _ = refused({"version": 1, "root": {"kind": "dir", "path": "here"}}, mnt)
    assert sentence.startswith('stack document: root.path: "here" is not absolute')

    keeper.mount(data, mnt)
    assert refused(stack, mnt) == (
        f"the mount point {mnt} is in use: something is mounted there; unmount it or take another",
        "EBUSY",
    )
    (data / "sub").mkdir()
    sentence, errno = refused(directory_stack(mnt / "sub"), place)
    assert (
        sentence.startswith(f"root.path: {mnt}/sub lies in a mount of this same service") and errno == "ELOOP"
    )
    nowhere = f"this service has nothing mounted at {data}"
    assert keeper.refused("unmount", mountpoint=str(data)) == (nowhere, "EINVAL")
    keeper.place.run("mount", "-t", "tmpfs", "none", mnt)
    sentence, errno = keeper.refused("unmount", mountpoint=str(mnt))
    assert "is in use" in sentence and errno == "EBUSY"
    assert len(our_mount_lines(keeper.place)) == 1
    sentence, _ = keeper.refused("fly")
    assert sentence.startswith("the order cannot be understood: unknown variant `fly`")


def test_without_a_fuse_device(isolated: Isolated, keeper: Keeper, data: Path) -> None:
    (isolated.directory / "mnt").mkdir()
    isolated.run("mount", "--bind", "/dev/null", "/dev/fuse")
    order = {"stack": directory_stack(data), "mountpoint": str(isolated.directory / "mnt")}
    sentence, _ = keeper.refused("mount", **order)
    assert "cannot be mounted" in sentence or "/dev/fuse cannot be opened" in sentence
    isolated.run("umount", "/dev/fuse")
    keeper.do("mount", **order)


def test_identical_stacks_unmount_in_either_order(keeper: Keeper, data: Path) -> None:
    one, two = (keeper.place.directory / name for name in ("one", "two"))
    for first, second in ((one, two), (two, one)):
        keeper.mount(data, one)
        keeper.mount(data, two)
        devices = {line.split()[2] for line in our_mount_lines(keeper.place)}
        assert len(devices) == 1
        keeper.do("unmount", mountpoint=str(first))
        assert keeper.place.run("cat", second / "file").stdout == "content\n"
        keeper.do("unmount", mountpoint=str(second))
        assert keeper.mounts() == [] and our_mount_lines(keeper.place) == []


def test_a_read_only_view_sees_what_is_written(keeper: Keeper, data: Path) -> None:
    place, directory = keeper.place, keeper.place.directory
    writer, reader = directory / "writer", directory / "reader"
    for first_read_only in (False, True):
        for read_only in (first_read_only, not first_read_only):
            mnt = reader if read_only else writer
            keeper.mount(data, mnt, coherence="exclusive", read_only=read_only)
        # Not flushed: the kernel holds it back, for both.
        place.run("sh", "-c", f"echo {first_read_only} >>{writer}/new")
        assert place.run("tail", "-n1", reader / "new").stdout == f"{first_read_only}\n"
        assert "Read-only file system" in place.run("touch", reader / "x", check=False).stderr
        place.run("touch", writer / "x")
        for mnt in (writer, reader):
            keeper.do("unmount", mountpoint=str(mnt))


def test_an_upper_has_one_writer(keeper: Keeper, data: Path) -> None:
    place, directory = keeper.place, keeper.place.directory
    for name in ("upper", "lower", "one", "two"):
        (directory / name).mkdir()

    def union(*lowers: Path) -> dict[str, object]:
        layers = [{"kind": "dir", "path": str(path), "read_only": True} for path in lowers]
        upper = {"kind": "dir", "path": str(directory / "upper"), "coherence": "exclusive"}
        return {"version": 1, "root": {"kind": "union", "lowers": layers, "upper": upper}}

    one, two = str(directory / "one"), str(directory / "two")
    keeper.do("mount", stack=union(data), mountpoint=one)
    refusal = keeper.refused("mount", stack=union(directory / "lower", data), mountpoint=two)
    assert refusal == (
        f"root.upper.path: {directory}/upper is the upper layer of another mounted stack; unmount that first",
        "EBUSY",
    )
    # A program that keeps an unmounted stack and those that mount it again are served by one union.
    held = subprocess.Popen(
        place.command("sh", "-c", f"cd {one}; echo; read x; echo held >new; cat file"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout is not None and held.stdout.readline() == "\n"
    keeper.do("unmount", mountpoint=one, lazy=True)
    keeper.do("mount", stack=union(data), mountpoint=two)
    place.run("sh", "-c", f"echo changed >{two}/file")
    assert held.communicate("\n", timeout=30)[0] == "changed\n"
    assert place.run("cat", f"{two}/new").stdout == "held\n"
    keeper.do("unmount", mountpoint=two)
    wait_until(lambda: keeper.do("stats")["mounts"] == [], "the end")
    keeper.do("mount", stack=union(directory / "lower", data), mountpoint=two)


def test_a_directory_of_one_stack_alone(keeper: Keeper, data: Path) -> None:
    directory = keeper.place.directory
    one, two = str(directory / "one"), str(directory / "two")
    for mountpoint in (one, two):
        Path(mountpoint).mkdir()

    def stack(coherence: str, **more: object) -> dict[str, object]:
        return {"version": 1, "root": {"kind": "dir", "path": str(data), "coherence": coherence}, **more}

    def below_a_union(**more: object) -> dict[str, object]:
        lower = {"kind": "dir", "path": str(data), "read_only": True, "coherence": "exclusive"}
        return {"version": 1, "root": {"kind": "union", "lowers": [lower]}, **more}

    def refused(place: str, other: dict[str, object]) -> None:
        sentence = (
            f"{place}.path: {data} is in another mounted stack that counts on being the only one to change"
            ' it; unmount that first, or give the directory the coherence "shared" in both'
        )
        assert keeper.refused("mount", stack=other, mountpoint=two) == (sentence, "EBUSY")

    keeper.do("mount", stack=stack("exclusive"), mountpoint=one)
    refused("root", stack("exclusive", write_back=False))
    refused("root.lowers[0]", below_a_union())
    keeper.do("mount", stack=stack("shared"), mountpoint=two)
    keeper.do("unmount", mountpoint=two)
    keeper.do("unmount", mountpoint=one)
    wait_until(lambda: keeper.do("stats")["mounts"] == [], "the end")
    # Several may read what none of them changes.
    keeper.do("mount", stack=below_a_union(), mountpoint=one)
    keeper.do("mount", stack=below_a_union(passthrough=True), mountpoint=two)
    keeper.do("unmount", mountpoint=two)
    refused("root", stack("exclusive"))


def test_a_stack_of_many_layers(keeper: Keeper, data: Path) -> None:
    """More descriptors than one message carries."""
    directory = keeper.place.directory
    paths = [directory / "layers" / str(number) for number in range(300)]
    for path in paths:
        path.mkdir(parents=True)
        (path / path.name).write_text(path.name)
    layers = [{"kind": "dir", "path": str(path), "read_only": True} for path in paths]
    (directory / "mnt").mkdir()
    stack = {"version": 1, "root": {"kind": "union", "lowers": layers}}
    keeper.do("mount", stack=stack, mountpoint=str(directory / "mnt"))
    names = keeper.place.run("ls", directory / "mnt").stdout.split()
    assert sorted(names) == sorted(path.name for path in paths)
    assert keeper.place.run("cat", directory / "mnt" / "299").stdout == "299"


def test_a_mount_point_that_moved(keeper: Keeper, data: Path) -> None:
    place, directory = keeper.place, keeper.place.directory
    (directory / "parent").mkdir()
    keeper.mount(data, directory / "parent" / "mnt")
    place.run("mv", directory / "parent", directory / "moved")
    keeper.mount(data, directory / "other")
    assert len({line.split()[2] for line in our_mount_lines(place)}) == 1
    # It is still known by the name under which it was ordered.
    keeper.do("unmount", mountpoint=str(directory / "parent" / "mnt"))
    assert [line.split()[4] for line in our_mount_lines(place)] == [str(directory / "other")]


def test_mounts_that_others_unmount_are_noticed(isolated: Isolated, data: Path) -> None:
    keeper = Keeper(isolated, idle_timeout_s=1)
    keeper.mount(data, isolated.directory / "mnt")
    isolated.run("umount", isolated.directory / "mnt")
    # Nobody asks the keeper: it has to notice by itself in order to end.
    assert keeper.process.wait(30) == 0
    assert not (keeper.run_dir / "control.sock").exists()
    keeper.close()


def test_signals_end_a_keeper_and_its_mounts(isolated: Isolated, data: Path) -> None:
    keeper = Keeper(isolated)
    keeper.mount(data, isolated.directory / "mnt")
    isolated.run("kill", "-TERM", str(keeper.inner_pid("keeper_pid")))
    assert keeper.process.wait(30) == 0
    assert our_mount_lines(isolated) == []
    keeper.close()


def test_a_dead_worker_from_which_nobody_takes_over_is_told_of_and_replaced(
    isolated: Isolated, data: Path
) -> None:
    keeper = Keeper(isolated, arguments=["--restarts=0"])
    place, mnt = isolated, isolated.directory / "mnt"
    keeper.mount(data, mnt)
    held = subprocess.Popen(
        place.command("sh", "-c", f"exec 3<{mnt}/file; echo; read x; cat <&3 || exit 9"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert held.stdout is not None and held.stdout.readline() == b"\n"
    first = keeper.inner_pid("worker_pid")
    place.run("kill", "-KILL", str(first))
    wait_until(lambda: keeper.mounts()[0]["dead"] is True, "the keeper notices")
    # Programs get errors, they do not hang.
    done = place.run("ls", mnt, check=False, timeout_s=20)
    assert done.returncode != 0
    assert "not connected" in done.stderr or "connection abort" in done.stderr.lower()
    held.communicate(b"\n", timeout=20)
    assert keeper.do("stats")["mounts"][0]["dead"] is True

    keeper.do("unmount", mountpoint=str(mnt))
    assert our_mount_lines(place) == []
    keeper.mount(data, mnt)
    assert place.run("cat", mnt / "file").stdout == "content\n"
    assert keeper.inner_pid("worker_pid") != first
    assert keeper.mounts()[0]["dead"] is False
    keeper.close()


def test_an_aborted_connection_is_told_of(keeper: Keeper, data: Path) -> None:
    place, mnt = keeper.place, keeper.place.directory / "mnt"
    keeper.mount(data, mnt)
    minor = our_mount_lines(place)[0].split()[2].split(":")[1]
    place.run("mount", "-t", "fusectl", "fusectl", "/sys/fs/fuse/connections")
    place.run("sh", "-c", f"echo 1 >/sys/fs/fuse/connections/{minor}/abort")
    wait_until(lambda: keeper.mounts()[0]["dead"] is True, "the keeper notices")
    keeper.do("unmount", mountpoint=str(mnt))


def test_a_worker_dies_with_its_keeper(isolated: Isolated, data: Path) -> None:
    keeper = Keeper(isolated)
    mnt = isolated.directory / "mnt"
    keeper.mount(data, mnt)
    worker = keeper.inner_pid("worker_pid")
    isolated.run("kill", "-KILL", str(keeper.inner_pid("keeper_pid")))
    keeper.process.wait(30)
    # Whether its parent has collected it yet is no matter.
    dead = f"[ ! -e /proc/{worker} ] || grep -q 'State:.Z' /proc/{worker}/status"
    wait_until(lambda: isolated.run("sh", "-c", dead, check=False).returncode == 0, "its end")
    done = isolated.run("ls", mnt, check=False, timeout_s=20)
    assert "not connected" in done.stderr
    keeper.close()
    # A new one takes the dead one's place at the socket, and its mount point once that is cleared.
    again = Keeper(isolated)
    isolated.run("umount", "--lazy", mnt)
    again.mount(data, mnt)
    assert isolated.run("cat", mnt / "file").stdout == "content\n"
    again.close()


def test_two_keepers_cannot_share_a_directory(isolated: Isolated, keeper: Keeper) -> None:
    with pytest.raises(AssertionError, match="Address already in use"):
        Keeper(isolated)
    assert keeper.mounts() == []


def test_hostile_clients_hold_up_nobody(keeper: Keeper) -> None:
    silent = [keeper.connect() for _ in range(40)]
    for connection in silent[:20]:
        connection.sendall(b'{"op":"li')
    assert keeper.mounts() == []

    endless = keeper.connect()
    with pytest.raises((ConnectionError, AssertionError)):
        for _ in range(200):
            endless.sendall(b"x" * 65536)
        assert b"longer than" not in read_line(endless)

    for nonsense in (
        b"\n",
        b"[]\n",
        b"\xff\xfe\n",
        b'{"op":"list","op":"list","x":1}\n',
        b"[" * 5000 + b"\n",
    ):
        connection = keeper.connect()
        connection.sendall(nonsense)
        assert b"cannot be understood" in read_line(connection)
        # The same connection is still good for an order.
        assert ask(connection, {"op": "list"}) == {"ok": {"mounts": []}}
        connection.close()

    gone = keeper.connect()
    gone.sendall(b'{"op":"stats"}\n' * 1000)
    gone.close()
    assert keeper.mounts() == []

    crowd = []
    for _ in range(100):
        connection = keeper.connect()
        connection.settimeout(0.2)
        crowd.append(connection)
    refused = sum(b"clients already" in _whatever_comes(connection) for connection in crowd)
    assert refused >= 36
    assert keeper.mounts() == []
    for connection in [*silent, *crowd, endless]:
        connection.close()
    wait_until(lambda: ask(keeper.connect(), {"op": "list"}) == {"ok": {"mounts": []}}, "room again")


def _whatever_comes(connection: socket.socket) -> bytes:
    try:
        return read_line(connection)
    except (TimeoutError, ConnectionError):
        return b""


def test_only_owner_and_root_give_orders(isolated: Isolated, keeper: Keeper) -> None:
    script = "import socket as s,sys; c=s.socket(s.AF_UNIX); c.connect(sys.argv[1]); print(c.recv(999))"
    stranger = ("setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", "/usr/bin/python3", "-c", script)
    socket_path = keeper.run_dir / "control.sock"
    assert "Permission denied" in isolated.run(*stranger, socket_path, check=False).stderr
    # Should somebody open up the directory, the keeper itself still asks who it is.
    socket_path.chmod(0o666)
    for directory in (keeper.run_dir, *keeper.run_dir.parents):
        if directory.stat().st_mode & 0o011 != 0o011:
            directory.chmod(directory.stat().st_mode | 0o011)
    answer = isolated.run(*stranger, socket_path).stdout
    assert "user 1234 may not give orders" in answer and '"EPERM"' in answer
