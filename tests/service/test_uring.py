"""FUSE over io_uring, where the kernel has it: deaths, unmounts, counters, and what doctor says."""

import fcntl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytropo.doctor import examine
from tests.conftest import Isolated
from tests.service.keepers import Keeper, wait_until

SWITCH = Path("/sys/module/fuse/parameters/enable_uring")


@pytest.fixture
def switch() -> Iterator[Path]:
    """The kernel's switch, which others leave alone meanwhile; put back in the end."""
    if not SWITCH.exists():
        pytest.skip("this kernel has no FUSE over io_uring")
    with Path("/tmp/polytropo-enable-uring.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = SWITCH.read_text()
        yield SWITCH
        SWITCH.write_text(before)


@pytest.fixture
def keeper(isolated: Isolated, switch: Path) -> Iterator[Keeper]:
    switch.write_text("Y")
    keeper = Keeper(isolated, arguments=["--fuse-transport=uring"])
    yield keeper
    print(keeper.log.read_text())
    keeper.close()


def slow(data: Path) -> dict[str, object]:
    """Every read takes two seconds."""
    rule = {"operation": "read", "delay_ms": 2000}
    below = {"kind": "dir", "path": str(data), "coherence": "shared"}
    return {"version": 1, "root": {"kind": "fault", "below": below, "rules": [rule]}}


def start_reading(keeper: Keeper, path: Path) -> "subprocess.Popen[str]":
    """A program that waits for an answer of the service's."""
    command = keeper.place.command("cat", path)
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # Until the service has the request; how long it takes to count does not matter, for it is not answered.
    time.sleep(0.5)
    assert reader.poll() is None
    return reader


def test_requests_are_counted_in_one_place(keeper: Keeper, data: Path, mnt: Path) -> None:
    keeper.mount(data, mnt)
    keeper.place.run("sh", "-c", f"for i in $(seq 50); do [ -e {mnt}/none$i ] || :; done; cat {mnt}/file")
    (told,) = keeper.do("stats")["mounts"]
    operations = told["operations"]
    assert operations["lookup"]["count"] >= 50 and operations["lookup"]["errors"] >= 50
    assert operations["read"]["count"] >= 1 and told["read_bytes"] >= len("content\n")
    # What begins a connection and what is forgotten comes from the device.
    of_device = sum(
        operations.get(name, {"count": 0})["count"] for name in ("init", "forget", "batch_forget")
    )
    assert told["over_rings"] == sum(each["count"] for each in operations.values()) - of_device
    keeper.do("unmount", mountpoint=str(mnt))
    (past,) = keeper.do("stats")["past"]
    assert past["over_rings"] >= told["over_rings"]


def test_a_killed_worker_leaves_nobody_waiting(keeper: Keeper, data: Path, mnt: Path) -> None:
    keeper.do("mount", stack=slow(data), mountpoint=str(mnt))
    reader = start_reading(keeper, mnt / "file")
    keeper.place.run("kill", "-KILL", str(keeper.inner_pid("worker_pid")))
    _, told = reader.communicate(timeout=20)
    assert reader.returncode != 0 and ("not connected" in told or "connection abort" in told)
    wait_until(lambda: keeper.mounts()[0]["dead"] is True, "the keeper notices")
    keeper.do("unmount", mountpoint=str(mnt))
    keeper.mount(data, mnt)
    assert keeper.place.run("cat", mnt / "file").stdout == "content\n"
    assert keeper.do("stats")["mounts"][0]["over_rings"] > 0


@pytest.mark.parametrize("lazy", [False, True], ids=["refused", "lazily"])
def test_unmount_with_a_request_in_flight(keeper: Keeper, data: Path, mnt: Path, lazy: bool) -> None:
    keeper.do("mount", stack=slow(data), mountpoint=str(mnt))
    reader = start_reading(keeper, mnt / "file")
    if lazy:
        keeper.do("unmount", mountpoint=str(mnt), lazy=True)
    else:
        sentence, errno = keeper.refused("unmount", mountpoint=str(mnt))
        assert errno == "EBUSY" and "in use" in sentence
    out, _ = reader.communicate(timeout=20)
    assert reader.returncode == 0 and out == "content\n", "what was asked before is answered"
    if not lazy:
        keeper.do("unmount", mountpoint=str(mnt))
    wait_until(lambda: "read" in keeper.do("stats")["past"][0]["operations"], "the door ends")
    assert keeper.mounts() == []


def test_an_abort_with_a_request_in_flight(keeper: Keeper, data: Path, mnt: Path) -> None:
    keeper.do("mount", stack=slow(data), mountpoint=str(mnt))
    reader = start_reading(keeper, mnt / "file")
    keeper.do("stop", force=True)
    reader.communicate(timeout=20)
    assert keeper.process.wait(30) == 0


def test_doctor_tells_how_the_switch_stands(switch: Path, tmp_path: Path) -> None:
    for position, told in (
        ("Y", "the kernel offers FUSE over io_uring"),
        ("N", "is switched off in the kernel"),
    ):
        switch.write_text(position)
        (finding,) = (each for each in examine(tmp_path / "home") if each.name == "fuse-io-uring")
        assert told in finding.sentence and finding.level == "good", finding
        assert (str(SWITCH) in finding.sentence) == (position == "N")
