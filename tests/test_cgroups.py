"""Control groups: how a host's layout is read, and what version 1 and 2 get told."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from polytropo.cgroups import Group, Hierarchies, Limits, empty_groups
from polytropo.errors import PolytropoError

_LINE = "31 23 0:28 / {} rw - {} x rw,{}\n"


def hierarchies_v2(root: Path, controllers: str = "cpu cpuset memory pids io") -> Hierarchies:
    """A directory that looks like a version 2 tree; the kernel's own files are plain ones here."""
    (root / "cgroup.controllers").write_text(controllers)
    (root / "cgroup.subtree_control").write_text("")
    return Hierarchies.find(_LINE.format(root, "cgroup2", ""))


def test_a_hybrid_layout_is_understood(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("hugetlb pids")
    text = _LINE.format("/c/cpu", "cgroup", "cpu,cpuacct") + _LINE.format("/c/memory", "cgroup", "memory")
    text += _LINE.format("/c/freezer", "cgroup", "freezer") + _LINE.format(tmp_path, "cgroup2", "")
    found = Hierarchies.find(text)
    assert found.controllers == {"cpu", "memory", "pids"}
    assert found.description == "version 1 and 2"
    assert found.roots() == [Path("/c/cpu"), Path("/c/memory"), tmp_path]
    assert found.others == (Path("/c/freezer"),)


def test_a_host_without_control_groups() -> None:
    found = Hierarchies.find("31 23 0:28 / / rw - ext4 /dev/vda rw\n")
    assert found.description == "none" and not found.controllers
    group = Group("polytropo/shop", found)
    group.create(Limits(cpus="0", memory_bytes=1))
    assert not group.exists() and group.memory_bytes() is None and group.pids() == set()
    group.remove()


def test_version_2_gets_its_own_words(tmp_path: Path) -> None:
    found = hierarchies_v2(tmp_path)
    assert found.controllers == {"cpu", "cpuset", "memory", "pids"}
    shop = tmp_path / "polytropo/shop"
    shop.mkdir(parents=True)
    for place in (shop.parent, shop):
        (place / "cgroup.subtree_control").write_text("")
    for name in ("cpuset.cpus", "memory.max", "pids.max"):
        (shop / name).write_text("")
    group = Group("polytropo/shop", found)
    group.create(Limits(cpus="0-1", memory_bytes=1 << 30))
    told = {name: (shop / name).read_text() for name in ("cpuset.cpus", "memory.max", "pids.max")}
    assert told == {"cpuset.cpus": "0-1", "memory.max": str(1 << 30), "pids.max": "max"}
    (shop / "memory.current").write_text("12345\n")
    (shop / "cpu.stat").write_text("usage_usec 7\nuser_usec 5\n")
    assert (group.memory_bytes(), group.cpu_time_ns()) == (12345, 7000)


def test_without_cpusets_the_time_is_held(tmp_path: Path) -> None:
    found = hierarchies_v2(tmp_path, "cpu memory")
    shop = tmp_path / "shop"
    shop.mkdir()
    for name in ("cpu.max", "memory.max"):
        (shop / name).write_text("")
    Group("shop", found).create(Limits(cpus="0,2-3"))
    assert (shop / "cpu.max").read_text() == "300000 100000"


@pytest.fixture
def real() -> Iterator[Group]:
    group = Group(f"polytropo-test-{os.getpid()}/shop")
    if os.geteuid() != 0 or not group.hierarchies.controllers:
        pytest.skip("needs root and control groups")
    try:
        yield group
    finally:
        top = Group(group.path.partition("/")[0], group.hierarchies)
        top.kill()
        top.remove()


def test_the_kernel_holds_a_group_to_its_limits(real: Group) -> None:
    real.create(Limits(cpus="0", memory_bytes=64 << 20, pids_max=16))
    leaf = real.child("service")
    leaf.create()
    enter = 'while [ "$1" != -- ]; do echo 0 >"$1" || exit 125; shift; done; shift; exec "$@"'
    eater = (
        "import os; print(sorted(os.sched_getaffinity(0)), flush=True); bytearray(os.urandom(1) * (96 << 20))"
    )
    command = ["sh", "-c", enter, "sh", *map(str, leaf.procs_files()), "--", "python3", "-c", eater]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[0]\n", done
    if real.hierarchies.controllers >= {"memory"}:
        assert done.returncode == -9, done
    assert (real.cpu_time_ns() or 0) > 0


def test_processes_below_are_found_ended_and_their_groups_removed(real: Group) -> None:
    leaf = real.child("container-1")
    leaf.create()
    process = subprocess.Popen(["sleep", "100"])
    try:
        for procs in leaf.procs_files():
            procs.write_text(str(process.pid))
        assert real.pids() == {process.pid}
        parent = real.path.partition("/")[0]
        assert [group.path for group in empty_groups(parent)] == []
        with pytest.raises(PolytropoError, match=f"still holds processes {process.pid}"):
            real.remove(wait_s=0)
        # The parent here collects the killed child; a keeper's is init.
        os.kill(process.pid, 9)
        process.wait(10)
        real.kill()
        assert [group.path for group in empty_groups(parent)] == [real.path]
        real.remove()
        assert not real.exists()
        real.remove()
    finally:
        process.kill()
        process.wait(10)


def test_groups_that_a_runtime_left_elsewhere_are_removed(real: Group) -> None:
    real.create()
    if not real.hierarchies.others:
        pytest.skip("this host has no further hierarchies")
    left = real.hierarchies.others[0] / real.path / "container-1"
    left.mkdir(parents=True)
    real.remove()
    assert not left.parent.exists()


def test_a_refused_limit_names_the_file(real: Group) -> None:
    if "cpuset" not in real.hierarchies.controllers:
        pytest.skip("needs the cpuset controller")
    with pytest.raises(PolytropoError, match=r"the kernel refuses 8000 for the file .*/cpuset\.cpus"):
        real.create(Limits(cpus="8000"))
