"""Making Debian images. The user's own cache is used: the first run takes a minute, others seconds."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from polytropo.images import ImageError
from polytropo.images.bootstrap import bootstrap, cache_directory
from polytropo.images.diff import changes
from polytropo.images.extract import unpack
from polytropo.images.layers import list_layers
from polytropo.images.streams import ChunkReader
from polytropo.images.walk import Tree
from polytropo.state import State
from tests.conftest import POLYTROPO
from tests.images.archives import directory, hard_link, member, symlink, tar, tree_of


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed")
@pytest.mark.timeout(600)
def test_debian_and_what_was_included_are_two_layers(state: State) -> None:
    image = bootstrap(state, "debian", include=["busybox"])
    top, base = image.layers
    assert (base / "usr/bin/bash").is_file() and not (base / "usr/bin/busybox").exists()
    assert (top / "usr/bin/busybox").is_file() and not (top / "usr/bin/bash").exists()
    assert "Package: busybox" in (top / "var/lib/dpkg/status").read_text()
    assert image.config.cmd == ["/bin/bash"]
    assert len(list(top.rglob("*"))) < 400
    plain = bootstrap(state, "plain")
    assert plain.layers == [base] and len(list_layers(state)) == 2
    assert sorted(cache_directory().glob(".*")) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"suite": "--help"}, '"--help" is no name of a Debian suite; write one like bookworm'),
        ({"include": ["sqlite3,--x"]}, '"--x" is no name of a package'),
        ({"include": ["busybox;ls"]}, '"busybox;ls" is no name of a package'),
        ({"mirror": "http://a b"}, '"http://a b" is no mirror'),
    ],
)
def test_words_for_mmdebstrap_are_checked(state: State, options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        bootstrap(state, "debian", **options)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_bootstrap_leaves_nothing_running(
    state: State, tmp_path: Path, number: signal.Signals
) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's mmdebstrap cleans up by itself")
    places = {"POLYTROPO_HOME": str(state.home), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    process = subprocess.Popen([POLYTROPO, "image", "bootstrap", "x"], env=os.environ | places)
    while not list(state.tmp.glob("bootstrap-*/mmdebstrap.*/proc")):
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(60)
    if number == signal.SIGKILL:
        while programs_with(str(state.home)):
            time.sleep(0.05)
        assert state.prune_scratch() == 1
    assert programs_with(str(state.home)) == [] and list(state.tmp.iterdir()) == []
    assert str(state.home) not in Path("/proc/self/mountinfo").read_text()


def programs_with(text: str) -> list[str]:
    """Command lines of running processes that speak of `text`, or have it in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            line = (path / "cmdline").read_text(errors="replace")
            if path.name != str(os.getpid()) and (
                text in line or text in (path / "environ").read_text(errors="replace")
            ):
                found.append(line)
    return found


def test_no_such_mirror(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        ImageError, match=r"cannot bootstrap bookworm: The repository .* does not have a Release file"
    ):
        bootstrap(state, "debian", mirror=f"file://{tmp_path}/none")
    assert not list((tmp_path / "cache/polytropo/bootstrap").glob("*.tar"))
    assert list(state.tmp.iterdir()) == []


def test_changes_turn_one_tree_into_another(tmp_path: Path) -> None:
    before = [
        directory("kept", mode=0o700, mtime=3),
        member("kept/same", b"same", mtime=4),
        member("kept/changed", b"one", mtime=5),
        member("kept/gone", b"x"),
        directory("gone"),
        member("gone/inside", b"x"),
        member("becomes-directory", b"x"),
    ]
    after = [
        directory("kept", mode=0o700, mtime=3),
        member("kept/same", b"same", mtime=4),
        member("kept/changed", b"two", mtime=5),
        member("first", b"linked"),
        hard_link("second", "first"),
        symlink("kept/link", "\udcff"),
        directory("becomes-directory"),
    ]
    for name, members in (("before", before), ("after", after)):
        unpack(ChunkReader(iter([tar(members)])), tmp_path / name, "native")
    with Tree(tmp_path / "before", "native") as old, Tree(tmp_path / "after", "native") as new:
        unpack(ChunkReader(changes(old, new)), tmp_path / "layer", "native")
    found = tree_of(tmp_path / "layer")
    written = [b"", b"kept", b"kept/changed", b"kept/link", b"first", b"second", b"becomes-directory"]
    assert set(found) == {*written, b"kept/.wh.gone", b".wh.gone"}
    wanted = tree_of(tmp_path / "after")
    assert {key: found[key] for key in written} == {key: wanted[key] for key in written}
