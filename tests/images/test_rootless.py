"""Images of an ordinary user: owners, modes and devices are kept in extended attributes."""

import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from polytropo.images import get_image, import_image, remove_image
from polytropo.images.commit import commit
from polytropo.images.flatten import flattened
from polytropo.images.walk import Tree
from polytropo.state import State
from tests.images.archives import Layout, directory, hard_link, member, symlink, tar, tree_of

USER = 12345
CAPABILITY = bytes.fromhex("0100000200200000" + "00" * 12)
ABLE = {"SCHILY.xattr.security.capability": CAPABILITY.decode("latin-1"), "SCHILY.xattr.user.k": "v"}
LAYER = tar(
    [
        directory("./", mode=0o755),
        directory("closed", mode=0o500, uid=7, gid=8, mtime=5),
        member("closed/secret", b"x", mode=0o4000, uid=33, gid=44, mtime=6),
        hard_link("again", "closed/secret"),
        member("able", b"x", mode=0o755, pax_headers=ABLE),
        member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("fifo", type=tarfile.FIFOTYPE, mode=0o600, uid=9),
        symlink("link", "/etc/passwd", uid=5),
        member("implied/by/name", b"x"),
    ]
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state directory's place that an ordinary user owns."""
    if os.geteuid() == 0:
        for parent in [tmp_path, *tmp_path.parents][:-1]:
            if parent.stat().st_uid == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
    (tmp_path / "user").mkdir()
    os.chown(tmp_path / "user", *([USER, USER] if os.geteuid() == 0 else [-1, -1]))
    return tmp_path / "user" / "home"


def as_user(work: Callable[[], None]) -> None:
    """Runs `work` in a process of an ordinary user; what it raises fails the test."""
    if os.geteuid() != 0:
        work()
        return
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            work()
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "it failed as an ordinary user; stderr says how"


def stat_of(path: Path) -> str:
    return os.getxattr(path, "user.polytropo.stat", follow_symlinks=False).decode()


def test_a_layer_as_an_ordinary_user(home: Path, tmp_path: Path) -> None:
    Layout(tmp_path / "app").image([LAYER])
    os.chmod(tmp_path / "app", 0o755)  # noqa: PTH101
    as_user(lambda: check_layer(home, tmp_path / "app"))


def import_into(home: Path, layout: Path) -> None:
    import_image(State.open(home), layout)


def check_layer(home: Path, layout: Path) -> None:
    state = State.open(home)
    [image] = import_image(state, layout)
    tree = image.layers[0]
    assert image.dirs[0].ownership == "xattr"
    assert stat_of(tree) == "40755 0 0 0"
    assert stat_of(tree / "closed") == "40500 7 8 0" and (tree / "closed").stat().st_mtime == 5
    assert stat_of(tree / "closed/secret") == "104000 33 44 0"
    assert stat_of(tree / "null") == f"20666 0 0 {os.makedev(1, 3)}" and (tree / "null").is_file()
    assert stat_of(tree / "fifo") == "10600 9 0 0"
    assert stat_of(tree / "implied") == "40755 0 0 0"
    assert (tree / "again").stat().st_ino == (tree / "closed/secret").stat().st_ino
    assert os.getxattr(tree / "able", "user.polytropo.xattr.security.capability") == CAPABILITY
    assert os.getxattr(tree / "able", "user.k") == b"v"
    for path in tree.rglob("*"):
        mode = path.lstat().st_mode
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o777 if stat.S_ISLNK(mode) else 0o600
        assert path.lstat().st_uid == os.geteuid() and stat.S_IMODE(mode) == wanted, path
    changed = home.parent / "upper"
    changed.mkdir()
    (changed / "mine").write_text("x")
    os.setxattr(changed / "mine", "user.polytropo.stat", b"100600 1 2 0")
    made = commit(state, image, changed, "xattr", name="two")
    assert stat_of(made.layers[0] / "mine") == "100600 1 2 0"
    remove_image(state, "two")
    remove_image(state, image.id)
    assert not list(state.layers.glob("*/*")) and not list(state.tmp.iterdir())


def test_both_ways_to_keep_owners_hold_the_same(home: Path, tmp_path: Path) -> None:
    """What an ordinary user's layer says, written out again and unpacked by root, is what root unpacks."""
    if os.geteuid() != 0:
        pytest.skip("needs root to have something to compare with")
    Layout(tmp_path / "app").image([LAYER])
    os.chmod(tmp_path / "app", 0o755)  # noqa: PTH101
    as_user(lambda: import_into(home, tmp_path / "app"))
    [rootless] = get_image(State(home), "app").layers
    state = State.open(tmp_path / "native")
    [native] = import_image(state, tmp_path / "app")[0].layers
    with Tree(rootless, "xattr") as tree:
        packed = b"".join(flattened(tree, []))
    (tmp_path / "again").mkdir()
    Layout(tmp_path / "again/app").image([packed])
    [again] = import_image(state, tmp_path / "again/app")[0].layers
    found, wanted = tree_of(again), tree_of(native)
    # A symbolic link cannot carry attributes of users.
    found.pop(b"link"), wanted.pop(b"link")
    assert found == wanted
