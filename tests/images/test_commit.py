"""Committing what a container wrote: the union's own format becomes a layer that everybody understands."""

import json
import os
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from polytropo.images import Image, ImageError, get_image, import_image
from polytropo.images.commit import commit
from polytropo.images.layers import list_layers
from polytropo.state import State
from tests.images.archives import Layout, directory, hard_link, member, tar, tree_of

LOWER = tar(
    [
        directory("dir", mode=0o750, uid=5, mtime=50),
        member("dir/below", b"below", uid=7, mtime=51),
        directory("dir/sub"),
        member("dir/sub/deep", b"deep"),
        member("dir/gone", b"x"),
        directory("other", mode=0o711, mtime=60),
        member("other/one", b"twins", mtime=61),
        hard_link("other/two", "other/one"),
        hard_link("third", "other/one"),
    ]
)
UPPER_LAYER = tar(
    [directory("dir", mode=0o700, mtime=52), member("dir/above", b"above"), member("dir/.wh.gone")]
)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


@pytest.fixture
def base(state: State, tmp_path: Path) -> Image:
    Layout(tmp_path / "base").image([LOWER, UPPER_LAYER], ref="1")
    return import_image(state, tmp_path / "base")[0]


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    (tmp_path / "upper/.wh..wh.polytropo/links").mkdir(parents=True)
    (tmp_path / "upper/.wh..wh.polytropo/tmp").mkdir()
    (tmp_path / "upper/.wh..wh.polytropo/tmp/7").write_text("half copied")
    return tmp_path / "upper"


def mark(path: Path, name: str, value: str) -> None:
    os.setxattr(path, f"user.polytropo.{name}", value.encode())


def top_of(image: Image) -> dict[str, object]:
    return {os.fsdecode(name): value[5] for name, value in tree_of(image.layers[0]).items()}


def test_plain_changes_become_a_layer_as_they_are(state: State, base: Image, upper: Path) -> None:
    (upper / "dir").mkdir()
    (upper / "dir/new").write_text("new")
    mark(upper / "dir/new", "origin", "1-17")
    os.setxattr(upper / "dir/new", "user.mine", b"kept")
    (upper / "dir/.wh.below").touch()
    (upper / "other").mkdir()
    (upper / "other/.wh..wh..opq").touch()
    os.mkfifo(upper / "fifo")
    os.symlink(b"\xff", upper / "link")  # noqa: PTH211
    os.link(upper / "dir/new", upper / "again")
    os.utime(upper / "dir", ns=(0, 1_500_000_000_123_456_789))
    image = commit(state, base, upper, "native", name="app:2", author="me", message="why")
    assert get_image(state, "app:2").digest == image.digest
    assert image.diff_ids[:-1] == base.diff_ids
    assert set(top_of(image)) == {
        "", "again", "dir", "dir/new", "dir/.wh.below", "fifo", "link", "other", "other/.wh..wh..opq"
    }  # fmt: skip
    made = tree_of(image.layers[0])
    assert made[b"dir/new"][7] == {"user.mine": b"kept"}
    assert made[b"dir/new"][6] == b"again" and made[b"link"][5] == b"\xff"
    assert made[b"dir"][4] == 1_500_000_000_123_456_789
    config = json.loads(image.config_json)
    assert config["author"] == "me" and config["history"][-1]["comment"] == "why"


def test_a_renamed_directory_gets_all_its_content(state: State, base: Image, upper: Path) -> None:
    (upper / "moved").mkdir(mode=0o700)
    mark(upper / "moved", "redirect", "/dir")
    (upper / "moved/added").write_text("added")
    (upper / "moved/.wh.below").touch()
    (upper / "moved/sub").mkdir()
    (upper / "moved/sub/also").write_text("also")
    (upper / ".wh.dir").touch()
    image = commit(state, base, upper, "native")
    assert set(top_of(image)) == {
        "", ".wh.dir", "moved", "moved/.wh..wh..opq", "moved/above", "moved/added", "moved/sub",
        "moved/sub/also", "moved/sub/deep",
    }  # fmt: skip


def test_a_directory_renamed_into_its_old_place_and_one_nested_in_it(
    state: State, base: Image, upper: Path
) -> None:
    (upper / "dir").mkdir()
    (upper / ".wh.dir").touch()
    mark(upper / "dir", "redirect", "other")
    (upper / ".wh.other").touch()
    (upper / ".wh.third").touch()
    (upper / "dir/inner").mkdir()
    mark(upper / "dir/inner", "redirect", "dir/sub")
    image = commit(state, base, upper, "native")
    assert set(top_of(image)) == {
        "", ".wh.other", ".wh.third", "dir", "dir/.wh..wh..opq", "dir/one", "dir/two", "dir/inner",
        "dir/inner/deep",
    }  # fmt: skip
    assert tree_of(image.layers[0])[b"dir/two"][6] == b"dir/one"


def test_a_directory_beside_its_own_whiteout_hides_what_is_below(
    state: State, base: Image, upper: Path
) -> None:
    (upper / ".wh.dir").touch()
    (upper / "dir").mkdir()
    (upper / "dir/only").write_text("x")
    (upper / ".wh.third").touch()
    (upper / "third").write_text("anew")
    assert set(top_of(commit(state, base, upper, "native"))) == {
        "", "dir", "dir/.wh..wh..opq", "dir/only", "third"
    }  # fmt: skip


def test_all_names_of_a_copied_file_are_written(state: State, base: Image, upper: Path) -> None:
    twin = base.layers[1] / "other/one"
    copied = upper / f".wh..wh.polytropo/links/1-{twin.stat().st_ino}"
    copied.write_text("changed")
    mark(copied, "links", "2")
    os.link(copied, upper / "third")
    (upper / "other").mkdir()
    (upper / "other/.wh.one").touch()
    os.utime(upper / "other", (1, 1))
    image = commit(state, base, upper, "native")
    made = tree_of(image.layers[0])
    assert set(made) == {b"", b"other", b"other/.wh.one", b"other/two", b"third"}
    assert (image.layers[0] / "other/two").read_text() == "changed"
    assert made[b"third"][6] == b"other/two" or made[b"other/two"][6] == b"third"


def test_directories_to_a_copied_name_keep_their_attributes(state: State, base: Image, upper: Path) -> None:
    twin = base.layers[1] / "other/one"
    copied = upper / f".wh..wh.polytropo/links/1-{twin.stat().st_ino}"
    copied.write_text("changed")
    (upper / ".wh.third").touch()
    made = tree_of(commit(state, base, upper, "native").layers[0])
    assert set(made) == {b"", b"other", b"other/one", b"other/two", b".wh.third"}
    assert made[b"other"][0] == "0o40711" and made[b"other"][4] == 60 * 10**9


def partial(upper: Path, below: Path, own: bytes, record: str, sums: bytes = b"") -> None:
    """Makes `large` in the upper, of which it has the bytes `own` only."""
    (upper / "large").write_bytes(own)
    status = below.stat()
    seconds, ns = divmod(status.st_mtime_ns, 10**9)
    line = record.format(size=status.st_size, mtime=f"{seconds}.{ns:09}")
    os.setxattr(upper / "large", "user.polytropo.blocks", line.encode() + b"/dir/sub/large\x02" + sums)


def partial_base(state: State, tmp_path: Path) -> Image:
    Layout(tmp_path / "base").image(
        [tar([member("dir/sub/large", b"aaaabbbbccccd", mtime=5)]), LOWER], ref="1"
    )
    return import_image(state, tmp_path / "base")[0]


@pytest.mark.parametrize(
    ("limit", "wanted"), [(13, b"aaaaBBBBccccdE"), (10, b"aaaaBBBBccCCDE"), (4, b"aaaaBBBBCCCCDE")]
)
def test_a_file_of_which_some_blocks_were_copied_is_written_whole(
    state: State, tmp_path: Path, upper: Path, limit: int, wanted: bytes
) -> None:
    base = partial_base(state, tmp_path)
    below = base.layers[1] / "dir/sub/large"
    partial(upper, below, b"\0\0\0\0BBBBCCCCDE", f"1 4 {limit} 1-9 {{size}} {{mtime}} 14 0\n")
    image = commit(state, base, upper, "native")
    assert (image.layers[0] / "large").read_bytes() == wanted


@pytest.mark.parametrize(("own", "wanted"), [(b"BBBB", b"aaaaBBBBccccd"), (b"BB\0\0", b"aaaabbbbccccd")])
def test_blocks_that_were_lost_with_the_power_are_those_of_the_image(
    state: State, tmp_path: Path, upper: Path, own: bytes, wanted: bytes
) -> None:
    base = partial_base(state, tmp_path)
    sums = struct.pack("<QI", 1, zlib.crc32(b"BBBB"))
    record = "1 4 13 1-9 {size} {mtime} 14 1\n"
    partial(upper, base.layers[1] / "dir/sub/large", bytes(4) + own + bytes(5), record, sums)
    assert (commit(state, base, upper, "native").layers[0] / "large").read_bytes() == wanted


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ("1 4 13 1-9 {size} {mtime} 99 0\n", "was damaged"),
        ("1 4 13 1-9 {size} {mtime} 14 1\n", "was damaged"),
        ("2 4 13 1-9 {size} {mtime} 14 0\n", "was damaged"),
        ("1 4 9999 1-9 {size} {mtime} 14 0\n", "was damaged"),
        ("1 4 13 7-9 {size} {mtime} 14 0\n", "in layer 7, which its image lacks"),
        ("1 4 13 2-9 {size} {mtime} 14 0\n", "which is gone"),
        ("1 4 13 1-9 77 {mtime} 14 0\n", "which is another file by now"),
        ("1 4 13 1-9 {size} 0.000000000 14 0\n", "which is another file by now"),
    ],
)
def test_a_record_that_leads_nowhere_is_refused(
    state: State, tmp_path: Path, upper: Path, record: str, complaint: str
) -> None:
    base = partial_base(state, tmp_path)
    partial(upper, base.layers[1] / "dir/sub/large", b"x" * 13, record)
    with pytest.raises(ImageError, match=complaint):
        commit(state, base, upper, "native")


def test_an_upper_of_a_later_version_is_refused(state: State, base: Image, upper: Path) -> None:
    (upper / ".wh..wh.polytropo/format-2").touch()
    commit(state, base, upper, "native")
    (upper / ".wh..wh.polytropo/format-3").touch()
    with pytest.raises(ImageError, match="format 3 of a later version"):
        commit(state, base, upper, "native")


def test_symlinks_and_devices_in_the_work_area_are_not_written(
    state: State, base: Image, upper: Path
) -> None:
    (upper / "link").symlink_to("t")
    os.link(upper / "link", upper / ".wh..wh.polytropo/links/1-99", follow_symlinks=False)
    assert set(top_of(commit(state, base, upper, "native"))) == {"", "link"}


@pytest.mark.parametrize("redirect", ["../../etc", "dir/../../..", ".wh..wh.polytropo/tmp"])
def test_a_hostile_redirect_is_refused(state: State, base: Image, upper: Path, redirect: str) -> None:
    (upper / "d").mkdir()
    mark(upper / "d", "redirect", redirect)
    before = len(list_layers(state))
    with pytest.raises(ImageError, match='the directory "d" has the impossible redirect'):
        commit(state, base, upper, "native")
    assert len(list_layers(state)) == before and list(state.tmp.iterdir()) == []


def test_a_redirect_to_nothing_is_an_empty_directory(state: State, base: Image, upper: Path) -> None:
    (upper / "d").mkdir()
    mark(upper / "d", "redirect", "no/such/place")
    assert set(top_of(commit(state, base, upper, "native"))) == {"", "d", "d/.wh..wh..opq"}


def test_owners_in_attributes_become_owners(state: State, base: Image, upper: Path) -> None:
    (upper / "file").write_text("x")
    mark(upper / "file", "stat", "104755 33 44 0")
    mark(upper / "file", "xattr.security.capability", "")
    os.setxattr(
        upper / "file",
        "user.polytropo.xattr.security.capability",
        bytes.fromhex("0100000200200000" + "00" * 12),
    )
    (upper / "null").touch()
    mark(upper / "null", "stat", f"20666 0 0 {os.makedev(1, 3)}")
    image = commit(state, base, upper, "xattr")
    status = (image.layers[0] / "file").stat()
    assert (oct(status.st_mode), status.st_uid, status.st_gid) == ("0o104755", 33, 44)
    assert os.listxattr(image.layers[0] / "file") == ["security.capability"]
    assert (image.layers[0] / "null").stat().st_rdev == os.makedev(1, 3)


def test_holes_stay_holes(state: State, base: Image, upper: Path) -> None:
    with (upper / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.seek(10 << 20)
        file.write(b"data" * 1024)
    with (upper / "hole").open("wb") as file:
        file.truncate(1 << 20)
    image = commit(state, base, upper, "native")
    made = image.layers[0] / "sparse"
    assert made.stat().st_size == 64 << 20 and made.stat().st_blocks * 512 < 1 << 20
    assert subprocess.run(["cmp", made, upper / "sparse"], check=False).returncode == 0
    assert (image.layers[0] / "hole").stat().st_blocks == 0


def test_changes_of_the_configuration(state: State, base: Image, upper: Path) -> None:
    changes = [
        'CMD ["sh", "-c", "x y"]', "entrypoint /bin/run me", "ENV A=1 B='two words'", "ENV C three",
        "ENV A=2",
        "EXPOSE 80 53/udp", "LABEL k=v", "STOPSIGNAL SIGINT", "USER www", 'VOLUME ["/data"]', "WORKDIR /srv",
    ]  # fmt: skip
    config = commit(state, base, upper, "native", changes=changes).config
    assert config.cmd == ["sh", "-c", "x y"] and config.entrypoint == ["/bin/sh", "-c", "/bin/run me"]
    assert config.env == ["B=two words", "C=three", "A=2"]
    assert config.exposed_ports == ["53/udp", "80/tcp"] and config.labels == {"k": "v"}
    assert (config.stop_signal, config.user, config.working_dir) == ("SIGINT", "www", "/srv")
    assert config.volumes == ["/data"]
    for wrong, sentence in (("RUN ls", "is no change"), ("CMD", "is no change"), ("CMD [1]", "no JSON list"),
                            ("ENV A='", "is no list"),
                            ("LABEL a=b c", '"c" is no NAME=VALUE')):  # fmt: skip
        with pytest.raises(ImageError, match=sentence):
            commit(state, base, upper, "native", changes=[wrong])


def test_links_in_the_upper_lead_nowhere(state: State, base: Image, upper: Path) -> None:
    (upper / "dir").symlink_to("/etc")
    (upper / "file").symlink_to("/etc/passwd")
    made = tree_of(commit(state, base, upper, "native").layers[0])
    assert made[b"dir"][5] == b"/etc" and set(made) == {b"", b"dir", b"file"}
