"""Saving images, and importing what was saved, here and by other programs."""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from polytropo.errors import StorageError
from polytropo.images import Image, import_image, prune, remove_image, tag_image
from polytropo.images.commit import commit
from polytropo.images.layers import list_layers
from polytropo.images.save import save
from polytropo.state import State
from tests.images.archives import Layout, sha256, tree_of
from tests.images.test_import import BASE, TOP
from tests.images.test_interruption import SMALL, same_trees


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


@pytest.fixture
def image(state: State, tmp_path: Path) -> Image:
    """An image with a layer of another program and one of ours on it."""
    Layout(tmp_path / "app").image([BASE, TOP, SMALL], ref="1")
    base = import_image(state, tmp_path / "app")[0]
    upper = tmp_path / "upper"
    (upper / "moved").mkdir(parents=True)
    os.setxattr(upper / "moved", "user.polytropo.redirect", b"/etc")
    (upper / ".wh.etc").touch()
    os.link(upper / ".wh.etc", upper / "zero")
    with (upper / "sparse").open("wb") as file:
        file.truncate(1 << 20)
    return commit(state, base, upper, "native", name="example.org/app:2")


def test_what_was_saved_gives_the_same_trees(state: State, image: Image, tmp_path: Path) -> None:
    save(state, image, tmp_path / "app.tar")
    other = State.open(tmp_path / "other")
    [again] = import_image(other, tmp_path / "app.tar")
    assert again.names == ["example.org/app:2"] and again.config == image.config
    assert same_trees(again, image)
    assert again.diff_ids[-1] == image.diff_ids[-1], "what we packed is packed to the same bytes again"
    save(other, again, tmp_path / "again.tar")
    assert sha256((tmp_path / "again.tar").read_bytes()) == sha256((tmp_path / "app.tar").read_bytes())
    assert import_image(other, tmp_path / "again.tar")[0].digest == again.digest
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_all_names_are_saved_to_a_stream(state: State, image: Image, tmp_path: Path) -> None:
    tag_image(state, "app:2", "other")
    out = io.BytesIO()
    save(state, tag_image(state, "app:2", "third"), out)
    again = import_image(State.open(tmp_path / "other"), io.BytesIO(out.getvalue()))
    assert again[-1].names == ["example.org/app:2", "other:latest", "third:latest"]
    assert len(again) == 1
    renamed = import_image(State.open(tmp_path / "other"), io.BytesIO(out.getvalue()), name="mine")
    assert renamed[0].digest == again[0].digest


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_other_programs_read_it(state: State, image: Image, tmp_path: Path) -> None:
    save(state, image, tmp_path / "app.tar")
    for form in ("oci-archive", "docker-archive"):
        copied = tmp_path / form
        command = ["skopeo", "--tmpdir", str(tmp_path), "copy", "--insecure-policy", "-q"]
        subprocess.run([*command, f"{form}:{tmp_path}/app.tar", f"oci:{copied}:x"], check=True, timeout=60)
        [again] = import_image(State.open(tmp_path / f"home-{form}"), copied)
        assert same_trees(again, image)


def test_a_place_that_cannot_be_written(state: State, image: Image, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot save the image: .*: No such file or directory"):
        save(state, image, tmp_path / "no/such/app.tar")
    (tmp_path / "app.tar").mkdir()
    with pytest.raises(StorageError, match=r"cannot save the image: .*: Is a directory"):
        save(state, image, tmp_path / "app.tar")
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_prune_removes_what_has_neither_name_nor_container(state: State, image: Image) -> None:
    remove_image(state, "app:1")
    assert len(list_layers(state)) == 4
    remove_image(state, "app:2", users=lambda digest: ["web"], force=True)
    pruned = prune(state)
    assert (pruned.images, pruned.layers) == (1, 4) and pruned.size_bytes > 100_000
    assert list_layers(state) == []


def test_usage_counts_shared_layers_once(state: State, image: Image) -> None:
    from polytropo.images import df

    usage = df(state)
    assert {tuple(each.names): each.unique_bytes > 0 for each in usage.images} == {
        ("app:1",): False,
        ("example.org/app:2",): True,
    }
    shared = {each.shared_bytes for each in usage.images}
    assert len(shared) == 1 and usage.unused_bytes == 0
    assert usage.total_bytes == shared.pop() + sum(each.unique_bytes for each in usage.images)


def test_a_configuration_is_kept_with_what_we_do_not_know(state: State, image: Image, tmp_path: Path) -> None:
    config = json.loads(image.config_json)
    assert config["rootfs"]["type"] == "layers" and len(config["history"]) == 1
    assert tree_of(image.layers[0])[b"moved"][0].startswith("0o40")
