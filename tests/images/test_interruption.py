"""Imports that are stopped, that run at the same time, or that fill the disk."""

import io
import os
import random
import re
import signal
import subprocess
import tarfile
import threading
from pathlib import Path

import pytest

from polytropo.errors import PolytropoError
from polytropo.images import Image, ImageError, get_image, import_image, list_images, prune, remove_image
from polytropo.images.layers import list_layers
from polytropo.state import State
from tests.conftest import POLYTROPO, Isolated
from tests.images.archives import Layout, directory, member, tar, tree_of

SEED = 20261123


def layer_of(size_bytes: int, files: int = 50, seed: int = 1) -> bytes:
    """A layer that does not compress."""
    dice = random.Random(seed)
    names = [f"dir-{seed}/file-{i}" for i in range(files)]
    return tar([directory("./"), *(member(name, dice.randbytes(size_bytes // files)) for name in names)])


BIG = layer_of(8 << 20)
SMALL = layer_of(100_000, seed=2)


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


def start(state: State, *arguments: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [POLYTROPO, "image", "import", *arguments],
        env=os.environ | {"POLYTROPO_HOME": str(state.home)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def half_way(state: State) -> "subprocess.Popen[bytes]":
    """An import that has unpacked half of its layer and waits for the rest."""
    process = start(state, "-", "--name", "half")
    assert process.stdin is not None
    process.stdin.write(BIG[: len(BIG) // 2])
    process.stdin.flush()
    while not list(state.tmp.glob("layer-*/layer/tree/dir-1/file-9")):
        assert process.poll() is None, process.communicate()
    return process


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_import_leaves_nothing(state: State, number: signal.Signals, status: int) -> None:
    process = half_way(state)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert (process.returncode, told) == (status, b"")
    assert list(state.tmp.iterdir()) == [] and list_layers(state) == [] and list_images(state) == []


@pytest.mark.timeout(60)
def test_a_killed_import_leaves_scratch_that_prune_clears(state: State) -> None:
    process = half_way(state)
    process.kill()
    process.communicate()
    assert list_layers(state) == [] and list_images(state) == [] and len(list(state.tmp.iterdir())) == 1
    assert prune(state).removed == 0 and state.prune_scratch() == 1
    assert list(state.tmp.iterdir()) == []
    assert import_image(state, io.BytesIO(BIG), name="half")[0].names == ["half:latest"]


@pytest.mark.timeout(120)
def test_killed_at_any_moment_there_is_a_whole_image_or_none(state: State, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "app").image([BIG, SMALL])
    reference = import_image(State.open(tmp_path / "reference"), layout.path)[0]
    dice = random.Random(SEED)
    outcomes = set()
    for _ in range(10):
        process = start(state, layout.path)
        try:
            process.communicate(timeout=dice.uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        outcomes.add((len(list_layers(state)), len(list_images(state))))
        for image in list_images(state):
            assert same_trees(image, reference)
    assert outcomes <= {(0, 0), (1, 0), (2, 0), (2, 1)}
    image = import_image(state, layout.path)[0]
    state.prune_scratch()
    assert same_trees(image, reference) and list(state.tmp.iterdir()) == []


def fillers(count: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Blobs of 2 MiB that an archive may hold."""
    return [member(f"blobs/sha256/{i:064}", bytes(2 << 20)) for i in range(count)]


def same_trees(image: Image, other: Image) -> bool:
    return [tree_of(path) for path in image.layers] == [tree_of(path) for path in other.layers]


def test_finished_layers_are_kept_and_the_import_goes_on_from_there(state: State, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "app").image([SMALL, BIG], "tar")
    blob = max((layout.path / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    sound = blob.read_bytes()
    blob.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ImageError, match="ends in the middle"):
        import_image(state, layout.path)
    [kept] = list_layers(state)
    blob.write_bytes(sound)
    small = next(path for path in (layout.path / "blobs/sha256").iterdir() if path.read_bytes() == SMALL)
    small.unlink()  # not needed any more
    image = import_image(state, layout.path)[0]
    assert image.diff_ids[0] == kept.diff_id
    assert prune(state).removed == 0


@pytest.mark.timeout(60)
def test_imports_at_the_same_time(state: State, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "app").image([BIG, SMALL])
    processes = [start(state, layout.path, "--name", f"app:{i}") for i in range(3)]
    for process in processes:
        _, told = process.communicate(timeout=50)
        assert process.returncode == 0, told
    assert get_image(state, "app:0").names == ["app:0", "app:1", "app:2"]
    assert len(list_layers(state)) == 2 and list(state.tmp.iterdir()) == []


@pytest.mark.timeout(60)
def test_prune_waits_for_an_import(state: State) -> None:
    process = half_way(state)
    pruner = threading.Thread(target=prune, args=[state])
    pruner.start()
    pruner.join(0.3)
    assert pruner.is_alive()
    process.communicate(BIG[len(BIG) // 2 :], timeout=30)
    pruner.join(20)
    assert not pruner.is_alive() and process.returncode == 0
    assert (get_image(state, "half").layers[0] / "dir-1/file-9").exists()


@pytest.mark.timeout(120)
def test_a_full_disk_leaves_what_was_there(isolated: Isolated, tmp_path: Path) -> None:
    Layout(tmp_path / "small").image([SMALL])
    Layout(tmp_path / "many").image([layer_of(30 << 20, files=3000)])
    Layout(tmp_path / "large").image([tar([member("f", bytes(40 << 20))])])
    isolated.home.mkdir()
    isolated.run("mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "none", isolated.home)
    isolated.polytropo("image", "import", tmp_path / "small")
    told = isolated.refused("image", "import", tmp_path / "many")
    assert re.search("cannot unpack a layer: the filesystem of .* is full; free some space", told), told
    told = isolated.refused("image", "import", tmp_path / "large")
    assert re.search('cannot unpack "f": it takes 40 MiB, but the filesystem of .* has .* left', told), told
    (tmp_path / "docker.tar").write_bytes(tar([member("manifest.json", b"[]"), *fillers(30)]))
    (tmp_path / "pipe").write_text(f"exec {POLYTROPO} image import - --name piped < {tmp_path}/docker.tar")
    told = isolated.run("sh", tmp_path / "pipe", check=False).stderr
    assert re.search('cannot keep "blobs/.*" of the archive: it takes 2 MiB, which the filesystem', told), (
        told
    )
    shown = isolated.json("image", "show", "small")
    assert shown["names"] == ["small:latest"]
    assert isolated.run("ls", isolated.home / "tmp").stdout == ""
    tree = f"{isolated.home}/layers/sha256/{shown['layers'][0]['diff_id'][7:]}/tree"
    assert isolated.run("sh", "-c", f"cat {tree}/dir-2/* | wc -c").stdout.strip() == "100000"


@pytest.mark.timeout(60)
def test_a_read_only_state_directory(isolated: Isolated, tmp_path: Path) -> None:
    Layout(tmp_path / "small").image([SMALL])
    isolated.polytropo("image", "import", tmp_path / "small")
    isolated.run("mount", "--bind", "-o", "ro", isolated.home, isolated.home)
    told = isolated.refused("image", "import", tmp_path / "small", "--name", "other")
    assert "is read-only" in told
    assert "is read-only; mount it writable" in isolated.refused("image", "rm", "small")
    assert [image["names"] for image in isolated.json("image", "list")] == [["small:latest"]]


@pytest.mark.timeout(120)
def test_a_disk_that_turns_read_only_in_the_middle_of_an_import(isolated: Isolated, tmp_path: Path) -> None:
    Layout(tmp_path / "small").image([SMALL])
    isolated.disk(isolated.home)
    isolated.polytropo("image", "import", tmp_path / "small")
    process = subprocess.Popen(
        isolated.command(POLYTROPO, "image", "import", "-", "--name", "half"),
        env=isolated.environment,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(BIG[: len(BIG) // 2])
    process.stdin.flush()
    half = f"{isolated.home}/tmp/layer-*/layer/tree/dir-1/file-9"
    while isolated.run("sh", "-c", f"ls {half}", check=False).returncode != 0:
        assert process.poll() is None, process.communicate()
    isolated.break_disk(isolated.home)
    told = process.communicate(BIG[len(BIG) // 2 :])[1].decode()
    assert process.returncode == 1 and told.count("\n") == 1, told
    assert re.fullmatch(r"polytropo: .*(is read-only|Read-only).*; .*\n", told), told
    assert [image["names"] for image in isolated.json("image", "list")] == [["small:latest"]]
    # Once the disk is whole again, prune clears what was left, and the import is made anew.
    isolated.run("umount", isolated.home)
    isolated.run("e2fsck", "-fy", isolated.directory / "disk.img", check=False)
    isolated.run("mount", "-o", "loop", isolated.directory / "disk.img", isolated.home)
    isolated.polytropo("system", "prune")
    assert isolated.run("ls", isolated.home / "tmp").stdout == ""
    (tmp_path / "big.tar").write_bytes(BIG)
    isolated.polytropo("image", "import", tmp_path / "big.tar", "--name", "whole")
    assert len(isolated.json("image", "list")) == 2


def test_a_record_that_is_damaged_is_told(state: State, tmp_path: Path) -> None:
    Layout(tmp_path / "small").image([SMALL])
    image = import_image(state, tmp_path / "small")[0]
    path = state.images / f"{image.digest[7:]}.json"
    path.write_text("{")
    with pytest.raises(PolytropoError, match="is damaged"):
        get_image(state, "small")
    path.unlink()
    import_image(state, tmp_path / "small")
    (image.layers[0].parent / "layer.json").unlink()
    with pytest.raises(ImageError, match=r"lacks its layer sha256:.*; remove it and import it again"):
        get_image(state, "small")
    remove_image(state, "small")
    assert import_image(state, tmp_path / "small")[0].layers == image.layers
