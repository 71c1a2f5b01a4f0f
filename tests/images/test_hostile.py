"""Layers made to do harm, or by mistake: refused with a sentence or kept inside the layer's tree."""

import gzip
import io
import os
import stat
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polytropo.errors import StorageError
from polytropo.images import Image, ImageError, import_image
from polytropo.images.extract import unpack
from polytropo.images.layers import list_layers
from polytropo.images.streams import ChunkReader
from polytropo.images.tar_writer import END
from polytropo.state import State
from tests.images.archives import Layout, directory, hard_link, member, sha256, symlink, tar, tree_of

Member = tuple[tarfile.TarInfo, bytes]


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory that no layer may touch."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "victim").write_text("untouched")
    before = tree_of(path)
    yield path
    assert tree_of(path) == before


def load(state: State, data: bytes) -> Image:
    return import_image(state, io.BytesIO(data), name="x")[0]


def made(state: State, *members: Member) -> Path:
    """The tree of a layer with these members."""
    return load(state, tar([directory("./"), *members])).layers[0]


def refused(state: State, data: bytes | list[Member], sentence: str) -> None:
    packed = data if isinstance(data, bytes) else tar([directory("./"), *data])
    with pytest.raises(ImageError, match=sentence) as failure:
        load(state, packed)
    assert "\n" not in failure.value.sentence and failure.value.sentence.isprintable()
    assert list_layers(state) == [] and list(state.tmp.iterdir()) == []


@pytest.mark.parametrize("what", ["uid", "gid"])
def test_owners_that_no_service_knows_are_refused(state: State, what: str) -> None:
    made(state, member("f", b"", **{what: 65_535}))
    system = State.open(state.home.with_name("other"))
    refused(system, [member("f", b"", **{what: 65_536})], f'"f" belongs to {what} 65536, .*below 65,536 only')


def raw(
    name: bytes, size: int | bytes = 0, type_flag: bytes = b"0", fill: bytes = b"", **fields: bytes
) -> bytes:
    """A header made by hand."""
    number = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(512)
    places = {
        "mode": 100,
        "uid": 108,
        "gid": 116,
        "size": 124,
        "mtime": 136,
        "link": 157,
        "magic": 257,
        "major": 329,
    }
    values = {"mode": b"0000644\0", "size": number, "magic": b"ustar\00000"} | fields
    block[: len(name)] = name
    block[156:157] = type_flag
    for key, value in values.items():
        block[places[key] : places[key] + len(value)] = value
    block[345 : 345 + len(fill)] = fill
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes) -> bytes:
    return raw(b"pax", len(records), b"x") + records + bytes(-len(records) % 512)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length = len(b"%d" % length) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "./..", "/../evil", "a/.."])
def test_parent_directories_in_names(state: State, name: str) -> None:
    refused(state, [member(name, b"x")], r'has ".." in its name')


@pytest.mark.parametrize("target", ["../../../etc/passwd", "a/../b"])
def test_parent_directories_in_hard_links(state: State, target: str) -> None:
    refused(state, [hard_link("a", target)], r'has ".." in its name or link')


def test_absolute_names_begin_at_the_layer(state: State, outside: Path) -> None:
    tree = made(state, member(f"{outside}/victim", b"mine"), member("//etc//./passwd", b"x"))
    assert (tree / str(outside)[1:] / "victim").read_text() == "mine"
    assert (tree / "etc/passwd").read_text() == "x"


def test_writing_through_an_absolute_link_stays_inside(state: State, outside: Path) -> None:
    tree = made(state, symlink("a", str(outside)), directory(str(outside)), member("a/victim", b"mine"))
    assert (tree / str(outside)[1:] / "victim").read_text() == "mine"


def test_writing_through_a_link_that_leads_nowhere(state: State, outside: Path) -> None:
    refused(
        state, [symlink("a", str(outside)), member("a/victim", b"x")], "lies below a link that leads nowhere"
    )


def test_writing_through_a_link_that_climbs_stays_inside(state: State, outside: Path) -> None:
    climb = "../" * 30 + str(outside)[1:]
    tree = made(
        state,
        directory(str(outside)),
        symlink("up", climb),
        member("up/new", b"x"),
        member("up/victim", b"m"),
    )
    assert (tree / str(outside)[1:] / "victim").read_text() == "m"


def test_links_through_links_stay_inside(state: State, outside: Path) -> None:
    tree = made(
        state,
        directory("inside"),
        symlink("one", "/"),
        symlink("two", "one/../../../.."),
        symlink("three", f"two{outside}"),
        symlink("four", "two/inside"),
        member("four/file", b"x"),
    )
    assert (tree / "inside/file").read_text() == "x"
    refused_tree = [symlink("one", "/"), symlink("three", f"one{outside}"), member("three/victim", b"x")]
    with pytest.raises(ImageError, match="lies below a link that leads nowhere"):
        load(state, tar(refused_tree))


def test_links_in_a_circle(state: State) -> None:
    refused(
        state, [symlink("a", "b"), symlink("b", "a"), member("a/x", b"")], "links that lead to each other"
    )


def test_replacing_a_link_does_not_follow_it(state: State, outside: Path) -> None:
    tree = made(
        state,
        symlink("a", f"{outside}/victim"),
        member("a", b"mine"),
        symlink("d", str(outside)),
        directory("d", mode=0o700),
        member("d/x", b""),
    )
    assert (tree / "a").read_text() == "mine" and not (tree / "a").is_symlink()
    assert (tree / "d").is_dir() and not (tree / "d").is_symlink()


def test_attributes_of_a_link_are_not_its_targets(state: State, outside: Path) -> None:
    victim = outside / "victim"
    victim.chmod(0o600)
    made(state, symlink("a", str(victim), mode=0o777, uid=1234, mtime=1))
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600 and victim.stat().st_uid == 0
    victim.chmod(0o644)


def test_hard_links_out(state: State, outside: Path) -> None:
    for target in (f"{outside}/victim", "/etc/passwd", "no/such"):
        refused(state, [hard_link("a", target)], "is a hard link to .*, which does not come before it")
    refused(
        state,
        [symlink("out", str(outside)), hard_link("a", "out/victim")],
        "is a hard link to .*, which does not come before it",
    )
    refused(state, [directory("d"), hard_link("a", "d")], "which cannot have another name")
    tree = made(
        state, symlink("out", f"{outside}/victim"), hard_link("a", "out"), member("b"), hard_link("b", "b")
    )
    assert (tree / "a").is_symlink() and (tree / "b").is_file()


def test_devices_are_made_as_data_of_the_layer(state: State) -> None:
    tree = made(
        state,
        member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
        member("disk", type=tarfile.BLKTYPE, devmajor=8, devminor=0, mode=0o660, gid=6),
        member("fifo", type=tarfile.FIFOTYPE),
    )
    assert (tree / "null").stat().st_rdev == os.makedev(1, 3) and (tree / "null").is_char_device()
    assert (tree / "disk").stat().st_gid == 6 and (tree / "disk").is_block_device()
    assert (tree / "fifo").is_fifo()
    huge = raw(b"dev", 0, b"3", major=b"7777777\0" + b"0000000\0")
    with pytest.raises(ImageError, match='"dev" has an impossible device number'):
        load(state, raw(b"./", 0, b"5") + huge + END)


def test_a_huge_file_is_refused_before_the_disk_is_full(state: State) -> None:
    data = raw(b"./", 0, b"5") + raw(b"big", b"\x80" + (2**50).to_bytes(11, "big")) + bytes(1 << 20)
    with pytest.raises(StorageError, match='cannot unpack "big": it takes 1 PiB, but the filesystem of'):
        load(state, data)
    assert list_layers(state) == [] and list(state.tmp.iterdir()) == []


def test_a_huge_sparse_file_is_refused(state: State) -> None:
    records = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")
    records += record(b"GNU.sparse.name", b"big") + record(b"GNU.sparse.realsize", b"%d" % 2**60)
    data = pax(records) + raw(b"GNUSparseFile.0/big", 512) + b"0\n".ljust(512, b"\0") + END
    refused(state, raw(b"./", 0, b"5") + data, 'its sparse file "big" pretends to be 1,?024 PiB long')


SPARSE = b"1\n4096\n4\n".ljust(512, b"\0") + b"data".ljust(512, b"\0")


def sparse_formats() -> Iterator[tuple[str, bytes]]:
    """The same file of 1 MiB with "data" at 4096, in each form that tars have for it."""
    size = record(b"GNU.sparse.size", b"1048576")
    pieces = record(b"GNU.sparse.offset", b"4096") + record(b"GNU.sparse.numbytes", b"4")
    yield "0.0", pax(size + record(b"GNU.sparse.numblocks", b"1") + pieces) + raw(b"f", 4) + SPARSE[512:]
    yield (
        "0.1",
        pax(size + record(b"GNU.sparse.name", b"f") + record(b"GNU.sparse.map", b"4096,4"))
        + raw(b"x", 4)
        + SPARSE[512:],
    )
    one = (
        record(b"GNU.sparse.major", b"1")
        + record(b"GNU.sparse.minor", b"0")
        + record(b"GNU.sparse.name", b"f")
    )
    yield "1.0", pax(one + record(b"GNU.sparse.realsize", b"1048576")) + raw(b"x", 516) + SPARSE
    fill = bytes(41) + b"%011o\0%011o\0" % (4096, 4) + bytes(72) + b"\0" + b"%011o\0" % 1048576
    yield "old", raw(b"f", 4, b"S", fill, magic=b"ustar  \0") + SPARSE[512:]


@pytest.mark.parametrize(("form", "data"), list(sparse_formats()))
def test_sparse_files_stay_sparse(state: State, form: str, data: bytes) -> None:
    path = load(state, raw(b"./", 0, b"5") + data + raw(b"next", 0) + END).layers[0] / "f"
    assert path.read_bytes() == bytes(4096) + b"data" + bytes(1048576 - 4100)
    assert path.stat().st_blocks <= 16
    assert (path.parent / "next").exists()


@pytest.mark.parametrize(
    "table", ["9\n0\n1\n", "1\n-1\n4\n", "1\n0\n", "2\n8\n4\n0\n4\n", "x", "99999999\n", "1\n0\n99\n"]
)
def test_sparse_maps_that_lie(state: State, table: str) -> None:
    records = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.name", b"f")
    records += record(b"GNU.sparse.realsize", b"100")
    data = pax(records) + raw(b"x", 516) + table.encode().ljust(512, b"\0") + b"data".ljust(512, b"\0") + END
    refused(state, raw(b"./", 0, b"5") + data, "sparse|ends in the middle")


def test_of_names_that_come_twice_the_last_one_counts(state: State) -> None:
    tree = made(
        state,
        member("file", b"first", uid=1),
        member("file", b"second"),
        directory("dir"),
        member("dir/inside", b"x"),
        member("dir", b"now a file"),
        member("becomes", b"x"),
        directory("becomes", mode=0o711),
        member("becomes/inside", b"x"),
        directory("merged", mode=0o700),
        member("merged/kept", b"x"),
        directory("merged", mode=0o755, mtime=9),
    )
    assert (tree / "file").read_text() == "second" and (tree / "file").stat().st_uid == 0
    assert (tree / "dir").read_text() == "now a file"
    assert (tree / "becomes/inside").exists() and stat.S_IMODE((tree / "becomes").stat().st_mode) == 0o711
    assert (tree / "merged/kept").exists() and (tree / "merged").stat().st_mtime == 9


def test_replacing_one_name_of_a_hard_link_keeps_the_other(state: State) -> None:
    tree = made(state, member("a", b"first"), hard_link("b", "a"), member("a", b"second"))
    assert (tree / "a").read_text() == "second" and (tree / "b").read_text() == "first"


def test_replacing_a_directory_forgets_where_it_was(state: State) -> None:
    tree = made(
        state,
        directory("d/e"),
        member("d/e/one", b""),
        symlink("d", "other"),
        directory("other/e"),
        member("d/e/two", b""),
    )
    assert sorted(path.name for path in (tree / "other/e").iterdir()) == ["two"]


def many_entries(count: int) -> Iterator[bytes]:
    for number in range(count):
        if number % 20 == 0:
            name = b"dir-%d/" % number
            yield raw(name, 0, b"5", mtime=b"00000000001\0")
        yield raw(name + b"file-%d" % number)
    yield END


def peak_of(count: int, tree: Path) -> int:
    tracemalloc.start()
    try:
        unpack(ChunkReader(many_entries(count)), tree, "native")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_number_of_entries(tmp_path: Path) -> None:
    few, many = peak_of(500, tmp_path / "few"), peak_of(8_000, tmp_path / "many")
    assert len(list((tmp_path / "many").iterdir())) == 400
    assert (tmp_path / "many/dir-0").stat().st_mtime == 1
    assert many < few + 200_000, f"{few} bytes for 500 entries, {many} for 8,000"


def test_a_gzip_bomb_behind_the_end(state: State) -> None:
    data = tar([directory("./")]) + bytes(65 << 20)
    refused(state, gzip.compress(data, 9), "more than 67108864 bytes follow the end of its tar archive")


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        (record(b"size", b"-1"), "impossible size"),
        (record(b"size", b"9" * 30), "impossible size"),
        (record(b"uid", b"4294967295"), "impossible uid 4294967295"),
        (record(b"uid", b"-5"), "impossible uid"),
        (record(b"mtime", b"yesterday"), "impossible time"),
        (record(b"mtime", b"1" * 200), "impossible time"),
        (record(b"path", b"a\0b"), "zero byte in its name"),
        (record(b"path", b"n" * 5000), "has a name of 5000 bytes"),
        (record(b"path", b"n" * 300), "a name that is too long"),
        (record(b"linkpath", b""), "a symbolic link to nothing"),
        (b"5 a=b\n", "damaged extended header"),
        (b"99999 a=b\n", "damaged extended header"),
        (b"-6 a=b\n", "damaged extended header"),
        (b"no length", "damaged extended header"),
        (b"6 a=bcd", "damaged extended header"),
        (record(b"SCHILY.xattr.user.polytropo.stat", b"100777 0 0 0"), "reserved attribute"),
        (record(b"SCHILY.xattr.user." + b"k" * 300, b"v"), "too large|does not take|too long"),
        (record(b"SCHILY.xattr.user.k", b"v" * 100_000), "extended attributes that are too large"),
    ],
)
def test_hostile_pax_headers(state: State, records: bytes, sentence: str) -> None:
    kind = b"2" if b"linkpath" in records else b"0"
    refused(state, raw(b"./", 0, b"5") + pax(records) + raw(b"file", 0, kind) + END, sentence)


def test_extended_headers_have_a_bound(state: State) -> None:
    head = raw(b"./", 0, b"5")
    for kind in (b"x", b"g", b"L", b"K"):
        refused(
            state,
            head + raw(b"pax", 1 << 30, kind),
            "extended header of 1073741824 bytes; 1048576 are the most",
        )
    refused(state, head + pax(record(b"path", b"x")), "ends after an extended header")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (raw(b"f", b"-0000000001\0"), "damaged size"),
        (raw(b"f", b"\xff" * 12), "impossible size -1"),
        (raw(b"f", b"\x80" + b"\xff" * 11), "impossible size"),
        (raw(b"f", b"12x45\0"), "damaged size"),
        (raw(b"f", 0, b"M"), "part of a multi-volume archive"),
        (raw(b"f", 0, b"Z"), "unknown type"),
        (raw(b"f", 0).replace(b"f", b"g", 1), "wrong checksum"),
        (raw(b"f", 100) + b"short", "ends in the middle of a file"),
        (raw(b"f")[:100], "middle of a header"),
        (bytes(512) + raw(b"f"), "empty header in the middle"),
        (raw(b"f"), "has no end"),
        (raw(b"f\x1b[31m\n/../x"), r'has ".." in its name'),
    ],
)
def test_damaged_headers(state: State, data: bytes, sentence: str) -> None:
    refused(state, raw(b"./", 0, b"5") + data, sentence)


def test_bad_text_and_odd_but_sound_headers(state: State) -> None:
    data = b"".join(
        [
            raw(b"./", 0, b"5"),
            raw(b"pax_global_header", 0, b"g"),
            pax(record(b"comment", b"\xff\xfe") + record(b"path", b"n\xffme") + record(b"mtime", b"-1.25")),
            raw(b"file"),
            raw(b"old-directory/"),
            raw(b"before-1970", mtime=b"\xff" * 11 + b"\xfe"),
            raw(b"cont", 3, b"7") + b"abc".ljust(512, b"\0"),
            END,
        ]
    )
    tree = load(state, data).layers[0]
    found = {os.fsencode(path.name): path.stat() for path in tree.iterdir()}
    assert set(found) == {b"n\xffme", b"old-directory", b"before-1970", b"cont"}
    assert found[b"n\xffme"].st_mtime_ns == -1_250_000_000
    assert found[b"before-1970"].st_mtime == -2 and (tree / "cont").read_text() == "abc"


def test_names_that_mean_something_to_unions(state: State) -> None:
    tree = made(
        state,
        member("a/.wh.gone", b"data that nobody needs", mode=0o777),
        member("a/.wh..wh..opq"),
        symlink("a/.wh.link", "/etc/passwd"),
        member("a/.wh..wh.plnk", b"aufs"),
        directory(".wh..wh.aufs"),
        member(".wh..wh.orph/x", b"aufs"),
        member(".whatever", b"an ordinary name"),
    )
    assert {os.fsdecode(name) for name in tree_of(tree)} == {
        "", ".whatever", "a", "a/.wh..wh..opq", "a/.wh.gone", "a/.wh.link"
    }  # fmt: skip
    assert (tree / "a/.wh.gone").stat().st_size == 0 and not (tree / "a/.wh.link").is_symlink()


@pytest.mark.parametrize(
    ("name", "kind", "sentence"),
    [
        (".wh..wh.polytropo", tarfile.DIRTYPE, "uses the reserved name"),
        (".wh..wh.polytropo/links/1-5", tarfile.REGTYPE, "uses the reserved name"),
        ("a/.wh..wh.polytropo", tarfile.REGTYPE, "uses the reserved name"),
        (".wh.a/b", tarfile.REGTYPE, "lies below a whiteout"),
        (".wh.a", tarfile.DIRTYPE, "a directory with the name of a whiteout"),
        (".wh.", tarfile.REGTYPE, "a whiteout of nothing"),
        (".wh..", tarfile.REGTYPE, "a whiteout of nothing"),
        (".wh...", tarfile.REGTYPE, "a whiteout of nothing"),
    ],
)
def test_names_that_would_confuse_unions(state: State, name: str, kind: bytes, sentence: str) -> None:
    refused(state, [member(name, type=kind)], sentence)


def test_the_root_is_a_directory(state: State) -> None:
    refused(
        state, [member("./", type=tarfile.SYMTYPE, linkname="/etc")], "names the root, but is a symbolic link"
    )
    refused(state, [member("/", type=tarfile.CHRTYPE)], "names the root, but is a character device")


def test_a_file_where_a_directory_is_needed(state: State) -> None:
    refused(state, [member("a", b"x"), member("a/b", b"x")], "lies below something that is no directory")


def test_a_name_too_long_for_a_path_is_made_or_refused(state: State) -> None:
    deep = "/".join(["d" * 250] * 16)
    tree = made(state, member(f"{deep}/f", b"x"))
    found = subprocess.run(["find", tree, "-printf", "%f "], capture_output=True, check=True).stdout.split()
    assert len(found) == 18 and found[-1] == b"f"
    refused_name = "/".join(["d" * 250] * 17)
    with pytest.raises(ImageError, match=r"has a name of .* bytes; 4095 are the most"):
        load(state, tar([directory("./"), member(f"{refused_name}/f", b"x")]))


def test_attributes_that_are_kept_and_those_that_are_not(state: State) -> None:
    capability = bytes.fromhex("0100000200200000" + "00" * 12)
    records = record(b"SCHILY.xattr.security.capability", capability) + record(
        b"SCHILY.xattr.user.a", b"1\0\n2"
    )
    records += record(b"SCHILY.xattr.trusted.overlay.opaque", b"y") + record(
        b"SCHILY.xattr.security.selinux", b"t"
    )
    tree = load(state, raw(b"./", 0, b"5") + pax(records) + raw(b"f") + END).layers[0]
    assert {key: os.getxattr(tree / "f", key) for key in os.listxattr(tree / "f")} == {
        "security.capability": capability, "user.a": b"1\0\n2"
    }  # fmt: skip


def test_a_layer_cannot_pass_for_another(state: State, tmp_path: Path) -> None:
    good, bad = tar([member("f", b"good")]), tar([member("f", b"evil")])
    layout = Layout(tmp_path / "layout")
    config: dict[str, Any] = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": [sha256(good)]}}
    layout.image([bad], config=config)
    with pytest.raises(ImageError, match="but its configuration says"):
        import_image(state, layout.path)
    assert list_layers(state) == []
