"""Looking after a state directory: what takes space, what killed commands leave, starting anew."""

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polytropo.cli.main import run
from polytropo.lifecycle import remove_tenant, remove_volume
from polytropo.maintenance import Pruned, prune, reset, usage
from polytropo.state import State
from polytropo.tenants import create_tenant, tenant_names
from polytropo.volumes import create_volume, list_volumes, volume_data

_MOMENTS_MAX = 2000
# Whatever an interpreter tells of as it happens: every change of a file is among these.
_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "fcntl.flock")


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a child that is killed right before its n-th event; False if it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            left = moment

            def hook(event: str, _arguments: object) -> None:
                nonlocal left
                if event in _EVENTS:
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status != 0


def every_moment(work: Callable[[], object], then: Callable[[], None]) -> int:
    for moment in range(_MOMENTS_MAX):
        if not killed_at(moment, work):
            return moment
        then()
    raise AssertionError("the work has no end")


def shape(state: State) -> list[str]:
    """The files of the state directory, without locks and without half-written files."""
    paths = (path.relative_to(state.home) for path in state.home.rglob("*"))
    return sorted(str(path) for path in paths if path.parts[0] != "locks")


def test_creation_killed_at_every_moment(state: State) -> None:
    create_tenant(state, "shop")
    before = shape(state)

    def check() -> None:
        prune(state)
        names = [volume.name for volume in list_volumes(state)]
        if names:
            assert (names, volume_data(state, "shop", "data").is_dir()) == (["data"], True)
            remove_volume(state, "shop", "data")
        (state.volumes / "shop").rmdir() if (state.volumes / "shop").exists() else None
        assert shape(state) == before

    assert every_moment(lambda: create_volume(state, "shop", "data"), check) > 10


def test_removal_killed_at_every_moment(state: State) -> None:
    def make() -> None:
        if "shop" not in tenant_names(state):
            create_tenant(state, "shop")
        if not list_volumes(state, "shop"):
            create_volume(state, "shop", "data")
            (volume_data(state, "shop", "data") / "deep").mkdir()
            (volume_data(state, "shop", "data") / "deep" / "file").write_text("x")

    def check() -> None:
        prune(state)
        if list_volumes(state):  # whole, or gone
            assert (volume_data(state, "shop", "data") / "deep" / "file").read_text() == "x"
        assert list(state.tmp.iterdir()) == []
        make()

    make()
    assert every_moment(lambda: remove_tenant(state, "shop", force=True), check) > 20
    assert prune(state) == Pruned()
    assert tenant_names(state) == [] and list_volumes(state) == []


def test_tenants_killed_at_every_moment_of_their_making(state: State) -> None:
    def check() -> None:
        prune(state)
        if tenant_names(state):
            remove_tenant(state, "shop")
        assert list(state.tenants.iterdir()) == []

    assert every_moment(lambda: create_tenant(state, "shop"), check) > 10


def test_reset_killed_at_every_moment_can_go_on(tmp_path: Path) -> None:
    home = tmp_path / "home"

    def make() -> State:
        state = State.open(home)
        if "shop" not in tenant_names(state):
            create_tenant(state, "shop")
        create_volume(state, "shop", "data") if not list_volumes(state, "shop") else None
        return state

    make()

    def again() -> None:
        reset(State.open(home))
        assert not home.exists()
        make()

    assert every_moment(lambda: reset(State.open(home)), again) > 30
    assert list(tmp_path.iterdir()) == []


def test_reset_keeps_what_is_not_ours(state: State) -> None:
    (state.home / "notes").write_text("mine")
    reset(state)
    assert [path.name for path in state.home.iterdir()] == ["notes"]


def test_prune_leaves_what_is_wanted_or_in_use(state: State) -> None:
    create_tenant(state, "shop")
    create_volume(state, "shop", "data")
    with state.scratch("import"):
        before = shape(state)
        assert prune(state) == Pruned()
        assert shape(state) == before
    (state.tmp / "left").mkdir()
    (state.tenants / "half").mkdir()
    assert prune(state) == Pruned(temporary_count=1, tenant_count=1)


def test_half_written_files_are_cleared_once_they_are_old(state: State) -> None:
    create_tenant(state, "shop")
    half = [
        path / ".thing.json.0123456789abcdef" for path in (state.home, state.images, state.tenants / "shop")
    ]
    for path in half:
        path.write_text("{")
    assert prune(state) == Pruned()
    for path in half:
        os.utime(path, (0, 0))
    assert prune(state) == Pruned(temporary_count=3)
    assert not any(path.exists() for path in half)


def test_usage_counts_each_kind(state: State) -> None:
    create_tenant(state, "shop")
    create_volume(state, "shop", "data")
    (volume_data(state, "shop", "data") / "file").write_bytes(b"x" * 100_000)
    shown = {each.kind: each for each in usage(state)}
    assert (shown["tenants"].count, shown["volumes"].count, shown["layers"].count) == (1, 1, 0)
    assert 100_000 <= shown["volumes"].size_bytes < 200_000


def test_reset_wants_to_be_sure(
    state: State, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYTROPO_HOME", str(state.home))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run(["system", "reset"]) == 1
    assert "say so with --force" in capsys.readouterr().err
    assert state.home.exists()
    assert run(["system", "reset", "--force"]) == 0
    assert not state.home.exists()
