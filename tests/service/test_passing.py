"""Files that the kernel reads itself: by whose leave, in which stacks, and what becomes of them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polytropo import hostprobe
from tests.conftest import Isolated
from tests.service.keepers import Keeper, wait_until

SIZE = 64 << 10


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    if not hostprobe.fuse().passthrough:
        pytest.skip("this kernel has no FUSE passthrough (Linux 6.9 has)")
    started = Keeper(isolated)
    yield started
    started.close()


@pytest.fixture
def image(isolated: Isolated) -> Path:
    lower = isolated.directory / "image"
    lower.mkdir()
    (lower / "file").write_bytes(b"i" * SIZE)
    (lower / "small").write_bytes(b"i")
    for path in (lower, lower / "file", lower / "small"):
        path.chmod(0o755)
    return lower


def show(keeper: Keeper, root: dict[str, Any], name: str = "mnt", **settings: Any) -> Path:
    at = keeper.place.directory / name
    at.mkdir()
    keeper.do("mount", stack={"version": 1, "root": root, **settings}, mountpoint=str(at))
    return at


def layer(path: Path) -> dict[str, Any]:
    return {"kind": "dir", "path": str(path), "read_only": True, "coherence": "immutable"}


def union(keeper: Keeper, image: Path) -> dict[str, Any]:
    upper = keeper.place.directory / "upper"
    upper.mkdir(exist_ok=True)
    upper.chmod(0o755)
    return {
        "kind": "union",
        "lowers": [layer(image)],
        "upper": {"kind": "dir", "path": str(upper), "coherence": "exclusive"},
    }


def passes(keeper: Keeper, shown: Path, below: Path) -> bool:
    """Whether programs read the file below itself: only then do they see it change (no image ever does)."""
    first = keeper.place.run("head", "-c1", shown).stdout
    with below.open("r+b") as file:
        file.write(b"#")
    seen = keeper.place.run("head", "-c1", shown).stdout
    with below.open("r+b") as file:
        file.write(first.encode())
    return seen == "#"


def test_stacks_do_that_say_so(keeper: Keeper, image: Path) -> None:
    plain = show(keeper, layer(image), passthrough=True)
    assert passes(keeper, plain / "file", image / "file")
    assert not passes(keeper, plain / "small", image / "small")
    for name, settings in (("unsaid", {}), ("cached", {"passthrough": False})):
        at = show(keeper, layer(image), name, **settings)
        assert not passes(keeper, at / "file", image / "file")
    all_sizes = show(keeper, layer(image), "all", passthrough=True, passthrough_min_bytes=0)
    assert passes(keeper, all_sizes / "small", image / "small")


def test_stacks_that_can_be_written_pass_through_what_is_not_changed(keeper: Keeper, image: Path) -> None:
    usual = show(keeper, union(keeper, image))
    assert not passes(keeper, usual / "file", image / "file")
    keeper.do("unmount", mountpoint=str(usual))
    at = show(keeper, union(keeper, image), "passing", passthrough=True)
    assert passes(keeper, at / "file", image / "file")
    keeper.place.run("sh", "-c", f"echo more >>{at}/file")
    assert not passes(keeper, at / "file", image / "file")
    assert keeper.place.run("stat", "-c%s", at / "file").stdout.strip() == str(SIZE + 5)
    assert (image / "file").read_bytes() == b"i" * SIZE


def test_what_may_fail_or_change_does_not(keeper: Keeper, image: Path) -> None:
    fault = {"kind": "fault", "below": layer(image), "rules": []}
    at = show(keeper, fault, passthrough=True, passthrough_min_bytes=0)
    assert not passes(keeper, at / "file", image / "file")
    exclusive = {**layer(image), "coherence": "exclusive"}
    at = show(keeper, exclusive, "exclusive", passthrough=True, passthrough_min_bytes=0)
    assert not passes(keeper, at / "file", image / "file")


def test_more_files_than_are_registered_at_once(keeper: Keeper, image: Path) -> None:
    many = image / "many"
    many.mkdir()
    many.chmod(0o755)
    for number in range(4_500):
        (many / str(number)).write_bytes(b"%d" % number)
    at = show(keeper, layer(image), passthrough=True, passthrough_min_bytes=0)
    script = (
        f"cd {at}/many; for i in 1 2; do cat $(ls) | sha256sum; done; exec 3<17; cat 4* >/dev/null; cat <&3"
    )
    lines = keeper.place.run("sh", "-c", script, timeout_s=120).stdout.splitlines()
    assert lines[0] == lines[1]
    assert lines[2] == "17"
    assert passes(keeper, at / "many" / "4", many / "4")


def test_a_dead_worker_does_not_leave_programs_waiting(keeper: Keeper, image: Path) -> None:
    at = show(keeper, layer(image), passthrough=True)
    held = subprocess.Popen(
        keeper.place.command("sh", "-c", f"exec 3<{at}/file; echo; read x; cat <&3 | wc -c"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert held.stdout is not None and held.stdout.readline() == b"\n"
    keeper.place.run("kill", "-KILL", str(keeper.inner_pid("worker_pid")))
    wait_until(lambda: keeper.mounts()[0]["dead"] is True, "the keeper notices")
    done = keeper.place.run("ls", at, check=False, timeout_s=20)
    assert done.returncode != 0
    held.communicate(b"\n", timeout=20)
    keeper.do("unmount", mountpoint=str(at))
    again = show(keeper, layer(image), "again", passthrough=True)
    assert passes(keeper, again / "file", image / "file")
