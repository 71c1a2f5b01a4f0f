"""Random trees through Python's tar writer and our reader, and through our writer and other readers."""

import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polytropo.images.diff import changes
from polytropo.images.extract import unpack
from polytropo.images.flatten import flattened
from polytropo.images.streams import ChunkReader
from polytropo.images.walk import Tree
from tests.images.archives import directory, hard_link, member, symlink, tar, tree_of

Member = tuple[tarfile.TarInfo, bytes]
MAX = settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))

# Short names from a small alphabet, so that they meet; with long, non-ASCII and non-UTF-8 ones among them.
PARTS = st.one_of(
    st.sampled_from(["a", "b", "c", ".d", "e f", "\udcff\udcfe", "\u00e9", "x" * 99, "y" * 155, "z" * 251]),
)
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
IDS = st.one_of(st.integers(0, 3), st.sampled_from([65534, 65535]))
TIMES = st.one_of(
    st.integers(-(2**31), 2**33), st.floats(1, 2**31, allow_nan=False).map(lambda t: round(t, 6))
)
DATA = st.one_of(st.binary(max_size=20), st.integers(500, 3000).map(bytes))
GNU = ("--warning=none", "--delay-directory-restore", "-xpf", "-")
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    """Entries that make sense one after the other: nothing lies below a file."""
    made: list[Member] = [directory("./", mtime=draw(st.integers(0, 9)))]
    kinds: dict[str, str] = {}
    for name in draw(st.lists(NAMES, max_size=12, unique=True)):
        parts = name.split("/")
        above = ["/".join(parts[:i]) for i in range(1, len(parts))]
        if any(kinds.get(each, "dir") != "dir" for each in above) or name in kinds:
            continue
        kinds |= dict.fromkeys(above, "dir")
        kind = draw(st.sampled_from(["file", "file", "dir", "link", "hard", "fifo", "device"]))
        files = [each for each, its in kinds.items() if its == "file"]
        if kind == "hard" and not files:
            kind = "file"
        kinds[name] = kind
        fields: dict[str, Any] = {
            "mode": draw(st.integers(0, 0o7777)), "uid": draw(IDS), "gid": draw(IDS), "mtime": draw(TIMES),
        }  # fmt: skip
        if kind == "file":
            made.append(member(name, draw(DATA), **fields))
        elif kind == "dir":
            made.append(directory(name, **fields))
        elif kind == "link":
            made.append(symlink(name, draw(NAMES), **fields | {"mode": 0o777}))
        elif kind == "hard":
            made.append(hard_link(name, draw(st.sampled_from(files))))
        elif kind == "fifo":
            made.append(member(name, None, type=tarfile.FIFOTYPE, **fields))
        else:
            made.append(member(name, None, type=tarfile.CHRTYPE, devmajor=1, devminor=3, **fields))
    return made


@contextmanager
def places() -> Iterator[Path]:
    with TemporaryDirectory() as path:
        yield Path(path)


def without_implied(tree: dict[bytes, tuple[Any, ...]], made: list[Member]) -> dict[bytes, tuple[Any, ...]]:
    """Directories that no entry made get other modes and times from each program."""
    named = {os.fsencode(info.name).rstrip(b"/") for info, _ in made} | {b""}
    return {name: value for name, value in tree.items() if name in named}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own files by anybody")
@MAX
@given(members(), FORMATS)
def test_our_reader_makes_what_gnu_tar_makes(made: list[Member], format: int) -> None:
    data = tar(made, format)
    with places() as place:
        unpack(io.BytesIO(data), place / "ours", "native")
        (place / "theirs").mkdir()
        command = ["tar", "-C", str(place / "theirs"), *GNU]
        subprocess.run(command, input=data, check=True, capture_output=True)
        ours, theirs = tree_of(place / "ours"), tree_of(place / "theirs")
        assert set(ours) == set(theirs)
        assert without_implied(ours, made) == without_implied(theirs, made)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own files by anybody")
@MAX
@given(members())
def test_our_writer_and_reader_give_the_tree_back(made: list[Member]) -> None:
    with places() as place:
        unpack(io.BytesIO(tar(made)), place / "first", "native")
        with Tree(place / "first", "native") as tree:
            packed = b"".join(flattened(tree, []))
            assert packed == b"".join(flattened(tree, [])), "the same tree gives the same bytes"
        unpack(io.BytesIO(packed), place / "second", "native")
        wanted = tree_of(place / "first")
        assert tree_of(place / "second") == wanted
        (place / "third").mkdir()
        command = ["tar", "-C", str(place / "third"), *GNU]
        subprocess.run(command, input=packed, check=True, capture_output=True)
        assert tree_of(place / "third") == wanted


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to own files by anybody")
@MAX
@given(members(), members())
def test_changes_from_one_tree_to_another_are_what_differs(before: list[Member], after: list[Member]) -> None:
    with places() as place:
        for side, made in (("before", before), ("after", after)):
            unpack(io.BytesIO(tar(made)), place / side, "native")
        with Tree(place / "before", "native") as old, Tree(place / "after", "native") as new:
            unpack(ChunkReader(changes(old, new)), place / "layer", "native")
        layer, wanted, was = (tree_of(place / each) for each in ("layer", "after", "before"))
        # The layer over the old tree: whiteouts first, then what it holds.
        result = dict(was)
        for name in layer:
            above, slash, last = name.rpartition(b"/")
            if last.startswith(b".wh."):
                gone = above + slash + last[4:]
                result = {k: v for k, v in result.items() if k != gone and not k.startswith(gone + b"/")}
        for name, value in layer.items():
            if not name.rpartition(b"/")[2].startswith(b".wh."):
                if not value[0].startswith("0o4"):
                    result = {k: v for k, v in result.items() if not k.startswith(name + b"/")}
                result[name] = value
        assert set(result) == set(wanted)
        assert {k: v[:6] for k, v in result.items()} == {k: v[:6] for k, v in wanted.items()}
