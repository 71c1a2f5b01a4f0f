"""Tenants: limits that hold, services that come and go."""

import time
from pathlib import Path

from polytropo.cgroups import Hierarchies
from tests.conftest import Isolated

_WAIT_S = 30.0


def mounted(isolated: Isolated, tenant: str) -> Path:
    data, mnt = isolated.directory / f"{tenant}-data", isolated.directory / f"{tenant}-mnt"
    data.mkdir()
    mnt.mkdir()
    isolated.polytropo("mount", "--tenant", tenant, data, mnt)
    return mnt


def test_the_service_lies_in_the_group_of_its_tenant(isolated: Isolated) -> None:
    isolated.polytropo("tenant", "create", "shop", "--cpus", "0", "--memory", "512MiB", "--cache", "64MiB")
    mounted(isolated, "shop")
    shown = isolated.json("tenant", "show", "shop")
    assert (shown["cpus"], shown["memory_bytes"], shown["cache_bytes"]) == ("0", 512 << 20, 64 << 20)
    assert shown["running"] and shown["process_count"] == 2
    assert 0 < shown["memory_used_bytes"] < 512 << 20
    for pid in (shown["keeper_pid"], shown["worker_pid"]):
        status = isolated.run("cat", f"/proc/{pid}/status").stdout
        if "cpuset" in Hierarchies.find().controllers:
            assert "Cpus_allowed_list:\t0\n" in status
        assert "/shop/service" in isolated.run("cat", f"/proc/{pid}/cgroup").stdout
    assert "cpu time" in isolated.polytropo("tenant", "show", "shop").stdout


def test_tenants_have_services_of_their_own(isolated: Isolated) -> None:
    for name in ("a", "b"):
        isolated.polytropo("tenant", "create", name)
        mounted(isolated, name)
    a, b = isolated.json("tenant", "list")
    assert a["keeper_pid"] != b["keeper_pid"] and a["uid_base"] != b["uid_base"]
    isolated.polytropo("unmount", isolated.directory / "a-mnt")
    isolated.polytropo("tenant", "rm", "a")
    (b_now,) = isolated.json("tenant", "list")
    assert b_now["keeper_pid"] == b["keeper_pid"] and b_now["running"]


def test_stop_and_remove(isolated: Isolated) -> None:
    isolated.polytropo("tenant", "create", "shop")
    mnt = mounted(isolated, "shop")
    isolated.polytropo("volume", "create", "-t", "shop", "orders")
    assert "still has the volume orders" in isolated.refused("tenant", "rm", "shop")
    isolated.polytropo("tenant", "stop", "--force", "shop")
    assert not isolated.json("tenant", "show", "shop")["running"]
    assert isolated.run("ls", mnt).stdout == "", "stopping took the mounts along"
    isolated.polytropo("tenant", "stop", "shop")
    isolated.polytropo("tenant", "rm", "--force", "shop")
    assert isolated.json("tenant", "list") == []


def test_an_idle_service_ends(isolated: Isolated) -> None:
    isolated.polytropo("tenant", "create", "shop", "--idle-timeout", "1")
    mnt = mounted(isolated, "shop")
    isolated.polytropo("unmount", mnt)
    deadline = time.monotonic() + _WAIT_S
    while isolated.json("tenant", "show", "shop")["running"]:
        assert time.monotonic() < deadline, "it stays"
        time.sleep(0.1)
    isolated.polytropo("mount", "--tenant", "shop", isolated.directory / "shop-data", mnt)
    assert isolated.json("tenant", "show", "shop")["running"]
