"""Importing OCI image layouts: what is stored, verified, named and refused."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from polytropo.compose import Dir, Stack, Union
from polytropo.compose import Image as ImageNode
from polytropo.images import ImageError, get_image, import_image, list_images, remove_image, tag_image
from polytropo.images.layers import list_layers
from polytropo.state import State
from tests.images.archives import (
    PACKERS,
    Layout,
    config_of,
    directory,
    hard_link,
    member,
    symlink,
    tar,
    tree_of,
)

BASE = tar(
    [
        directory("./", mtime=1_000_000_000),
        directory("etc", mtime=1_000_000_001, mode=0o750, uid=3, gid=4),
        member("etc/passwd", b"root:x:0:0\n", mtime=1_000_000_002),
        member("bin/tool", b"\x7fELF" * 1000, mode=0o4755, uid=0, gid=42),
        hard_link("bin/alias", "bin/tool"),
        symlink("lib", "/usr/lib"),
    ]
)
TOP = tar([member("etc/.wh.passwd"), member("etc/.wh..wh..opq"), member("etc/group", b"x")])


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


@pytest.mark.parametrize("packing", list(PACKERS))
def test_a_layout_becomes_layers_that_are_as_tar_would_make_them(
    state: State, tmp_path: Path, packing: str
) -> None:
    Layout(tmp_path / "app").image([BASE, TOP], packing, ref="1.2")
    [image] = import_image(state, tmp_path / "app")
    assert image.names == ["app:1.2"]
    (tmp_path / "base.tar").write_bytes(BASE)
    expected = tmp_path / "expected"
    expected.mkdir()
    subprocess.run(["tar", "-xpf", tmp_path / "base.tar", "-C", expected], check=True)
    os.utime(expected / "bin", (0, 0))
    os.utime(expected, (1_000_000_000, 1_000_000_000))
    top, base = image.layers
    assert tree_of(base) == tree_of(expected)
    assert sorted(tree_of(top)) == [b"", b"etc", b"etc/.wh..wh..opq", b"etc/.wh.passwd", b"etc/group"]
    assert (top / "etc/.wh.passwd").stat().st_size == 0


def test_an_image_in_a_stack_stands_for_its_layers(state: State, tmp_path: Path) -> None:
    Layout(tmp_path / "app").image([BASE, TOP])
    [image] = import_image(state, tmp_path / "app", name="app")
    root = Stack(ImageNode("app")).resolve(state).root
    assert isinstance(root, Union)
    assert list(root.lowers) == [
        Dir(path, read_only=True, coherence="immutable", ownership="native") for path in image.layers
    ]


def test_layers_are_stored_once(state: State, tmp_path: Path) -> None:
    Layout(tmp_path / "one").image([BASE])
    Layout(tmp_path / "two").image([BASE, TOP], "tar+zstd")
    import_image(state, tmp_path / "one")
    inode = list_images(state)[0].layers[0].stat().st_ino
    import_image(state, tmp_path / "two")
    assert len(list_layers(state)) == 2
    assert get_image(state, "two").layers[1].stat().st_ino == inode
    assert list(state.tmp.iterdir()) == []


def test_names_mean_what_podman_users_expect(state: State, tmp_path: Path) -> None:
    Layout(tmp_path / "one").image([BASE], ref="docker.io/library/debian:latest")
    Layout(tmp_path / "two").image([TOP], ref="localhost/app:2")
    debian = import_image(state, tmp_path / "one")[0]
    app = import_image(state, tmp_path / "two")[0]
    for reference in ("debian", "debian:latest", "library/debian", "docker.io/library/debian", debian.digest,
                      debian.digest[7:], debian.id, debian.id[:4], f"debian@{debian.digest}"):  # fmt: skip
        assert get_image(state, reference).digest == debian.digest, reference
    assert get_image(state, "app:2").digest == app.digest
    with pytest.raises(
        ImageError, match=r'there is no image "app"; there are: docker.io/.*, localhost/app:2'
    ):
        get_image(state, "app")
    with pytest.raises(ImageError, match="cannot name an image"):
        get_image(state, "No/Such Image")
    tag_image(state, "debian", "example.org/app:2")
    with pytest.raises(
        ImageError, match=r"could be example.org/app:2, localhost/app:2; write the whole name"
    ):
        get_image(state, "app:2")


def test_a_name_moves_to_the_image_that_got_it_last(state: State, tmp_path: Path) -> None:
    Layout(tmp_path / "one").image([BASE])
    Layout(tmp_path / "two").image([TOP])
    first = import_image(state, tmp_path / "one", name="app")[0]
    second = import_image(state, tmp_path / "two", name="app")[0]
    assert get_image(state, "app").digest == second.digest
    assert get_image(state, first.id).names == []
    tag_image(state, first.id, "app")
    assert get_image(state, "app").digest == first.digest


def test_remove_takes_names_and_with_the_last_one_the_image(state: State, tmp_path: Path) -> None:
    Layout(tmp_path / "one").image([BASE])
    Layout(tmp_path / "two").image([BASE, TOP])
    one = import_image(state, tmp_path / "one")[0]
    import_image(state, tmp_path / "two")
    tag_image(state, "one", "other")
    with pytest.raises(ImageError, match="has the names one:latest, other:latest"):
        remove_image(state, one.id)
    assert remove_image(state, "one") is None
    with pytest.raises(ImageError, match="is used by the container web"):
        remove_image(state, "other", users=lambda digest: ["web"])
    assert get_image(state, "other").digest == one.digest
    assert remove_image(state, "two") is not None
    assert [record.diff_id for record in list_layers(state)] == one.diff_ids
    assert remove_image(state, "other", users=lambda digest: ["web"], force=True) is None
    assert get_image(state, one.id).names == []
    assert remove_image(state, one.id) == one.digest
    assert list_layers(state) == [] and list_images(state) == []


def test_damage_is_found_by_digest(state: State, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "app").image([BASE], "tar")
    blob = max((tmp_path / "app/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blob.write_bytes(blob.read_bytes().replace(b"root:x", b"root::"))
    with pytest.raises(ImageError, match=r"cannot import .*: it has the digest sha256:.*; get a sound copy"):
        import_image(state, layout.path)
    other = Layout(tmp_path / "lie").image([BASE], config=config_of([TOP]))
    with pytest.raises(ImageError, match=r"it unpacks to sha256:.*, but its configuration says sha256:"):
        import_image(state, other.path)
    assert list_layers(state) == [] and list_images(state) == [] and list(state.tmp.iterdir()) == []


def test_config_is_read_and_kept_whole(state: State, tmp_path: Path) -> None:
    config = config_of([BASE], Env=["A=1"], Cmd=["sh"], Entrypoint=None, User="3:4", WorkingDir="/srv",
                       ExposedPorts={"80/tcp": {}}, Volumes={"/data": {}}, StopSignal="SIGINT")  # fmt: skip
    Layout(tmp_path / "app").image([BASE], config=config | {"x-unknown": [1.50]})
    [image] = import_image(state, tmp_path / "app")
    found = image.config
    assert (found.env, found.cmd, found.entrypoint, found.user) == (["A=1"], ["sh"], [], "3:4")
    assert (found.working_dir, found.exposed_ports, found.volumes) == ("/srv", ["80/tcp"], ["/data"])
    assert found.stop_signal == "SIGINT"
    assert '"x-unknown": [1.5]' in image.config_json


@pytest.mark.parametrize(
    ("media_type", "sentence"),
    [
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "a foreign layer"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "a foreign layer"),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "is encrypted"),
    ],
)
def test_layers_that_cannot_be_had_are_refused(
    state: State, tmp_path: Path, media_type: str, sentence: str
) -> None:
    layout = Layout(tmp_path / "app")
    config = layout.json_blob(config_of([BASE]), "application/vnd.oci.image.config.v1+json")
    layer = layout.blob(BASE, media_type)
    manifest = {"schemaVersion": 2, "config": config, "layers": [layer]}
    layout.index(layout.json_blob(manifest, "application/vnd.oci.image.manifest.v1+json"))
    with pytest.raises(ImageError, match=sentence):
        import_image(state, layout.path)


def test_a_manifest_list_gives_the_image_for_this_machine(state: State, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "app")
    arm = layout.manifest([TOP], config=config_of([TOP]) | {"architecture": "arm64"})
    amd = layout.manifest([BASE])
    arm["platform"] = {"os": "linux", "architecture": "arm64"}
    index_type = "application/vnd.oci.image.index.v1+json"
    only_arm = layout.json_blob({"schemaVersion": 2, "manifests": [arm]}, index_type)
    amd["platform"] = {"os": "linux", "architecture": "amd64"}
    both = layout.json_blob({"schemaVersion": 2, "manifests": [arm, amd]}, index_type)
    layout.index(both)
    [image] = import_image(state, layout.path)
    assert image.layers[0].joinpath("etc/passwd").exists()
    layout.manifests.clear()
    with pytest.raises(ImageError, match=r"it has images for linux/arm64; this program runs .* linux/amd64"):
        import_image(state, layout.index(only_arm).path)
    layout.manifests.clear()
    del arm["platform"]
    with pytest.raises(ImageError, match=r"it is made for arm64"):
        import_image(state, layout.index(arm).path)


def test_several_images_in_a_layout(state: State, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "app").image([BASE], ref="1").image([TOP], ref="2")
    with pytest.raises(ImageError, match='it holds several images, "1", "2"'):
        import_image(state, layout.path, name="x:3")
    assert import_image(state, layout.path, name="x:2")[0].names == ["x:2"]
    assert [image.names[-1] for image in import_image(state, layout.path)] == ["app:1", "x:2"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_tar_formats_give_one_tree(state: State, tmp_path: Path, format: int) -> None:
    long = "d" * 90 + "/" + "e" * 60
    names = [long] if format == tarfile.USTAR_FORMAT else [long, "x" * 200, "y" * 120 + "/" + "z" * 200]
    layer = tar([member(name, b"data", mtime=5, uid=1000, gid=65535) for name in names], format)
    Layout(tmp_path / "app").image([layer])
    [image] = import_image(state, tmp_path / "app")
    for name in names:
        path = image.layers[0] / name
        assert path.read_bytes() == b"data"
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mtime) == (1000, 65535, 5)
