"""`cp` both ways; links in the container do not lead out of it."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from polytropo.containers.copying import Place, copy, unpack
from polytropo.errors import PolytropoError
from tests.conftest import Isolated


@pytest.mark.parametrize("running", [True, False])
def test_both_ways(box: Isolated, running: bool) -> None:
    box.polytropo("run", "-d", "--name", "c", "box", "sleep", "60" if running else "0")
    if not running:
        box.polytropo("wait", "c")
    source = box.directory / "site"
    (source / "sub").mkdir(parents=True)
    (source / "sub/page").write_text("page")
    (source / "sub/page").chmod(0o640)
    os.utime(source / "sub/page", (1000, 1000))
    (source / "link").symlink_to("sub/page")
    os.link(source / "sub/page", source / "hard")
    box.polytropo("cp", source, "c:/srv")
    box.polytropo("cp", source / "sub/page", "c:/srv/sub/second")
    box.polytropo("cp", f"{source}/.", "c:/tmp")
    back = box.directory / "back"
    box.polytropo("cp", "c:/srv", back)
    assert (back / "sub/page").read_text() == (back / "sub/second").read_text() == "page"
    status = (back / "sub/page").stat()
    assert (status.st_mode & 0o7777, status.st_mtime) == (0o640, 1000)
    assert (back / "link").readlink() == Path("sub/page")
    assert (back / "hard").stat().st_ino == status.st_ino
    box.polytropo("cp", "c:/tmp/sub", back)
    assert sorted(path.name for path in (back / "sub").iterdir()) == ["page", "second"]
    packed = box.run("sh", "-c", "polytropo cp c:/srv - | tar t | sort").stdout.split()
    assert packed == ["srv/", "srv/hard", "srv/link", "srv/sub/", "srv/sub/page", "srv/sub/second"]
    box.run("sh", "-c", f"tar c -C {source} . | polytropo cp - c:/home")
    box.polytropo("cp", "c:/home/sub/page", box.directory / "single")
    assert (box.directory / "single").read_text() == "page"
    # What was copied is the container's own to keep.
    if running:
        assert box.polytropo("exec", "c", "cat", "/srv/link").stdout == "page"


def test_links_in_the_container_stay_inside(box: Isolated) -> None:
    box.polytropo("run", "--name", "c", "box", "sh", "-c", "ln -s /etc/greeting /g; ln -s /nowhere /d")
    target = box.directory / "file"
    target.write_text("new")
    # /out is a link to /etc, /up one that climbs above the root; both mean the container's.
    box.polytropo("cp", target, "c:/out/copied")
    box.polytropo("cp", target, "c:/up/copied-too")
    assert not Path("/etc/copied").exists() and not Path("/etc/copied-too").exists()
    box.polytropo("cp", "c:/etc/copied", box.directory / "back")
    assert (box.directory / "back").read_text() == "new"
    box.polytropo("cp", "c:/g", box.directory / "g")
    assert (box.directory / "g").is_symlink()
    box.polytropo("cp", "c:/out/greeting", box.directory / "greeting")
    assert (box.directory / "greeting").read_text() == "hello\n"


def test_what_cannot_be_copied(box: Isolated) -> None:
    box.polytropo("run", "-d", "--name", "c", "box", "sleep", "60")
    here = box.directory
    assert "no c:/nope" in box.refused("cp", "c:/nope", here)
    assert "no /nope" in box.refused("cp", "/nope", "c:/")
    assert "CONTAINER:PATH" in box.refused("cp", "/etc/hostname", here)
    assert "CONTAINER:PATH" in box.refused("cp", "c:/a", "c:/b")
    # No hexadecimal digit: an identifier may begin with one.
    assert '"nobody"' in box.refused("cp", "nobody:/a", here)
    assert "device" in box.refused("cp", "c:/dev/null", here / "null")
    assert "no directory" in box.refused("cp", "/etc/hostname", "c:/nope/")
    assert "cannot" in box.refused("cp", "/etc/hostname", "c:/nope/deeper")
    assert "no directory" in box.refused("cp", "/etc", "c:/etc/passwd")
    assert "damaged" in box.refused("cp", "-", "c:/", stdin="no archive")


def _place(path: Path) -> Place:
    return Place(os.open(path, os.O_PATH | os.O_DIRECTORY), "/", str(path))


def test_a_hostile_archive_stays_below(tmp_path: Path) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir()
    inside.mkdir()
    (inside / "old").symlink_to(outside)

    def archive(*members: tarfile.TarInfo) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as made:
            for each in members:
                made.addfile(each)
        with (tmp_path / "a.tar").open("rb") as stream:
            unpack(stream, _place(inside), archive=False)

    def member(name: str, **fields: object) -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        for key, value in fields.items():
            setattr(info, key, value)
        return info

    archive(member("/absolute"))
    assert (inside / "absolute").exists()
    for bad in (member("../climbs"), member("a/../../climbs")):
        with pytest.raises(PolytropoError, match="leads out"):
            archive(bad)
    link = member("link", type=tarfile.SYMTYPE, linkname=str(outside))
    with pytest.raises(PolytropoError):
        archive(link, member("link/through"))
    with pytest.raises(PolytropoError):
        archive(member("old/through"))
    with pytest.raises(PolytropoError):
        archive(member("hard", type=tarfile.LNKTYPE, linkname="../../../etc/passwd"))
    with pytest.raises(PolytropoError):
        archive(member("node", type=tarfile.CHRTYPE, devmajor=1, devminor=3))
    archive(member("setuid", mode=0o4755))
    assert (inside / "setuid").stat().st_mode & 0o7777 == 0o755
    assert list(outside.iterdir()) == []


def test_a_fifo_does_not_hold_it_up(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    os.mkfifo(tmp_path / "from/pipe")
    (tmp_path / "to").mkdir()
    source = Place(_place(tmp_path).root, "/from", "from")
    copy(source, _place(tmp_path / "to"), archive=True)
    assert subprocess.run(["test", "-p", tmp_path / "to/from/pipe"], check=False).returncode == 0
