"""The state directory: versions, locks, records, scratch."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from polytropo import state as state_module
from polytropo.errors import PolytropoError, StorageError, storage_errors
from polytropo.state import Record, State, default_home, read_record, write_atomically, write_record
from polytropo.trees import remove_tree


class Thing(Record):
    name: str
    size_bytes: int = 0


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


def test_layout_is_made_once_and_closed_to_others(state: State) -> None:
    assert (state.home / "version").read_text() == "1\n"
    for name in ("layers", "images", "tmp", "locks", "volumes"):
        assert (state.home / name).stat().st_mode & 0o077 == 0
    before = sorted(p.name for p in state.home.iterdir())
    State.open(state.home)
    assert sorted(p.name for p in state.home.iterdir()) == before


def test_default_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTROPO_HOME", "/x")
    assert default_home() == Path("/x")
    monkeypatch.delenv("POLYTROPO_HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_home() == Path("/var/lib/polytropo")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_home() == Path("/data/polytropo")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_home() == Path("/home/u/.local/share/polytropo")


def test_newer_version_is_refused(state: State) -> None:
    (state.home / "version").write_text("2\n")
    with pytest.raises(PolytropoError, match="has layout version 2, this program knows up to 1"):
        State.open(state.home)


def test_damaged_version_is_refused(state: State) -> None:
    (state.home / "version").write_text("one")
    with pytest.raises(PolytropoError, match="damaged version file"):
        State.open(state.home)


def test_directory_without_version_is_migrated(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir(mode=0o755)
    (tmp_path / "layers/kept").write_text("x")
    state = State.open(tmp_path)
    assert (state.layers / "kept").read_text() == "x"
    assert state.layers.stat().st_mode & 0o777 == 0o700
    assert (state.home / "version").read_text() == "1\n"


def test_foreign_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(PolytropoError, match="is no state directory"):
        State.open(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_migrations_run_in_order(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(state_module, "VERSION", 3)
    steps = [lambda _s: done.append(0), lambda _s: done.append(1), lambda _s: done.append(2)]
    monkeypatch.setattr(state_module, "_MIGRATIONS", steps)
    State.open(state.home)
    assert done == [1, 2]
    assert (state.home / "version").read_text() == "3\n"


def test_many_open_a_new_home_at_once(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code = "import sys, pathlib, polytropo.state as s; s.State.open(pathlib.Path(sys.argv[1]))"
    running = [subprocess.Popen([sys.executable, "-c", code, str(home)]) for _ in range(4)]
    assert [p.wait(60) for p in running] == [0] * 4
    assert (home / "version").read_text() == "1\n"


def test_record_round_trip_and_refusals(state: State) -> None:
    path = state.images / "thing.json"
    write_record(path, Thing(name="é", size_bytes=3))
    assert read_record(path, Thing) == Thing(name="é", size_bytes=3)
    path.write_text('{"version": 9, "new": []}')
    with pytest.raises(PolytropoError, match="version 9"):
        read_record(path, Thing)
    path.write_text('{"version": 1, "name": 3}')
    with pytest.raises(PolytropoError, match="is damaged"):
        read_record(path, Thing)
    with pytest.raises(FileNotFoundError):
        read_record(state.images / "absent", Thing)


def test_write_that_fails_leaves_the_old_file(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    path = state.images / "thing.json"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in state.images.iterdir()] == ["thing.json"]


def test_locks_exclude_and_share(state: State) -> None:
    refused = pytest.raises(PolytropoError, match="held the lock images")
    with state.lock("images", shared=True), state.lock("images", shared=True), refused:
        state.lock("images", timeout_s=0)
    with state.lock("images", timeout_s=0), state.lock("other", timeout_s=0):
        pass


def test_lock_is_handed_on_when_released(state: State) -> None:
    held = state.lock("images")
    got = threading.Event()

    def wait() -> None:
        with state.lock("images", timeout_s=60):
            got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    held.release()
    thread.join(60)
    assert got.is_set()


def test_scratch_is_removed_at_the_end_and_kept_from_prune(state: State) -> None:
    with state.scratch("import") as scratch:
        (scratch.path / "file").write_text("x")
        assert state.prune_scratch() == 0
        assert (scratch.path / "file").exists()
    assert list(state.tmp.iterdir()) == []


def test_prune_clears_what_a_killed_process_left(state: State) -> None:
    code = (
        "import sys, os, signal; from pathlib import Path; from polytropo.state import State\n"
        "with State.open(Path(sys.argv[1])).scratch('dead') as s:\n"
        "    (s.path / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(state.home)], timeout=60).returncode == -9
    (state.tmp / "stray").write_text("x")
    assert len(list(state.tmp.iterdir())) == 2
    assert state.prune_scratch() == 2
    assert list(state.tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "is full"),
        (errno.EROFS, "is read-only"),
        (errno.EACCES, "may not be used by this user"),
        (errno.EIO, "/f: Input/output error"),
    ],
)
def test_failures_of_the_host_become_sentences(number: int, words: str) -> None:
    with pytest.raises(StorageError, match=words) as caught, storage_errors("import app", Path("/home")):
        raise OSError(number, "x", "/f")
    assert caught.value.errno == number
    assert str(caught.value).startswith("cannot import app: ")


def test_remove_tree_of_any_depth_and_mode(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / ".removed-1").mkdir()
    (top / ".removed-1" / "x").write_text("x")
    (top / os.fsdecode(b"\xff")).symlink_to(tmp_path)
    descriptor = os.open(top, os.O_RDONLY)
    for _ in range(500):
        os.mkdir("d" * 200, dir_fd=descriptor)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=descriptor)
        os.mkdir("sibling", dir_fd=descriptor, mode=0)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    remove_tree(top)
    remove_tree(top)
    assert list(tmp_path.iterdir()) == []
