"""Importing tar archives: OCI archives, docker archives, root filesystems; from files and standard input."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from polytropo.images import ImageError, import_image, list_images
from polytropo.images.layers import list_layers
from polytropo.state import State
from tests.images.archives import PACKERS, Layout, config_of, directory, member, sha256, symlink, tar
from tests.images.test_import import BASE, TOP


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State.open(tmp_path / "home")


class Slow(io.RawIOBase):
    """A pipe that gives little at a time and cannot go back."""

    def __init__(self, data: bytes) -> None:
        self._rest = data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._take(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def _take(self, size: int) -> bytes:
        part, self._rest = self._rest[: min(size, 777)], self._rest[min(size, 777) :]
        return part


def oci_archive(layout: Layout, first: str = "blobs") -> bytes:
    files = [path for path in sorted(layout.path.rglob("*")) if path.is_file()]
    files.sort(key=lambda path: not str(path.relative_to(layout.path)).startswith(first))
    return tar([member(f"./{path.relative_to(layout.path)}", path.read_bytes()) for path in files])


def docker_archive(layers: list[bytes], *tags: str, style: str = "docker") -> bytes:
    config = json.dumps(config_of(layers, Cmd=["sh"])).encode()
    config_name = f"{sha256(config)[7:]}.json"
    members, names = [], []
    for layer in layers:
        digits = sha256(layer)[7:]
        if style == "docker":
            members += [
                directory(digits),
                member(f"{digits}/VERSION", b"1.0"),
                member(f"{digits}/layer.tar", layer),
            ]
            names.append(f"{digits}/layer.tar")
        else:  # podman: layers beside the manifest, and links to them as docker has it
            members += [member(f"{digits}.tar", layer), symlink(f"{digits}/layer.tar", f"../{digits}.tar")]
            names.append(f"{digits}/layer.tar")
    manifest: list[dict[str, Any]] = [{"Config": config_name, "RepoTags": list(tags), "Layers": names}]
    members += [member(config_name, config), member("manifest.json", json.dumps(manifest).encode())]
    return tar(members)


@pytest.mark.parametrize("packing", list(PACKERS))
@pytest.mark.parametrize("through", ["file", "stdin"])
@pytest.mark.parametrize("kind", ["oci", "docker", "podman", "rootfs"])
def test_every_archive_gives_the_same_layers(
    state: State, tmp_path: Path, kind: str, through: str, packing: str
) -> None:
    layers = [BASE] if kind == "rootfs" else [BASE, TOP]
    if kind == "oci":
        data = oci_archive(Layout(tmp_path / "layout").image(layers, ref="example.org/app:1"))
    elif kind == "rootfs":
        data = BASE
    else:
        data = docker_archive(layers, "example.org/app:1", style=kind)
    data = PACKERS[packing](data)
    name = "example.org/app:1" if kind == "rootfs" else None
    if through == "file":
        (tmp_path / "some.tar").write_bytes(data)
        [image] = import_image(state, tmp_path / "some.tar", name=name)
    else:
        [image] = import_image(state, io.BufferedReader(Slow(data)), name=name)
    assert image.names == ["example.org/app:1"]
    assert image.diff_ids == [sha256(layer) for layer in layers]
    assert (image.layers[-1] / "etc/passwd").read_text() == "root:x:0:0\n"
    assert list(state.tmp.iterdir()) == []


def test_a_root_filesystem_is_named_by_its_file_and_can_run(state: State, tmp_path: Path) -> None:
    (tmp_path / "My-Root.tar.gz").write_bytes(gzip.compress(BASE))
    [image] = import_image(state, tmp_path / "My-Root.tar.gz")
    assert image.names == ["my-root:latest"]
    assert image.config.cmd == ["/bin/sh"] and image.config.env[0].startswith("PATH=")
    with pytest.raises(ImageError, match="it does not say its name; give one with --name NAME"):
        import_image(state, io.BytesIO(BASE))


def test_the_index_may_come_before_the_blobs(state: State, tmp_path: Path) -> None:
    data = oci_archive(Layout(tmp_path / "layout").image([BASE], ref="a:1"), first="index")
    assert import_image(state, io.BytesIO(data))[0].names == ["a:1"]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is empty"),
        (b"no archive at all" * 100, "it is no tar archive"),
        (gzip.compress(b"text" * 300), "it is no tar archive"),
        (BASE[:700], "ends in the middle of a"),
        (BASE[:2048], "no end|middle of a"),
        (gzip.compress(BASE)[:-20], "gzip stream ends too early"),
        (gzip.compress(BASE)[:300] + b"\xff" * 300, "gzip stream is damaged|gzip stream ends too early"),
        (b"BZh91AY&SY", "it is compressed with bzip2; use gzip, zstd or no compression"),
        (tar([member("manifest.json", b"[]")]), "it holds 0 images"),
        (tar([member("manifest.json", b"{")]), '"manifest.json" is damaged|manifest.json is damaged'),
        (tar([member("oci-layout", b"{}")]), "looks like an image archive, but has no index.json"),
        (tar([member("index.json", b"[]")]), '"index.json" is damaged'),
        (
            tar([member("manifest.json", b'[{"Config":"../../etc/passwd","Layers":["/etc/shadow"]}]')]),
            r'it lacks "../../etc/passwd"',
        ),
        (
            tar([member("manifest.json", b'[{"Config":"a","Layers":["a"]}]'), symlink("a", "/etc/passwd")]),
            'it lacks "a"',
        ),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(
    state: State, tmp_path: Path, data: bytes, sentence: str
) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    for source in (tmp_path / "x.tar", io.BytesIO(data)):
        with pytest.raises(ImageError, match=sentence) as failure:
            import_image(state, source, name="x")
        assert "\n" not in failure.value.sentence
    assert list_images(state) == [] and list_layers(state) == [] and list(state.tmp.iterdir()) == []


def test_several_images_in_a_docker_archive(state: State, tmp_path: Path) -> None:
    members, manifests = [], []
    for packed in (docker_archive([BASE], "a:1"), docker_archive([TOP], "b:1", "b:2")):
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for info in archive:
                file = archive.extractfile(info)
                data = file.read() if file else b""
                if info.name == "manifest.json":
                    manifests += json.loads(data)
                else:
                    members.append((info, data))
    data = tar([*members, member("manifest.json", json.dumps(manifests).encode())])
    assert [i.names for i in import_image(state, io.BytesIO(data))] == [["a:1"], ["b:1", "b:2"]]
    with pytest.raises(ImageError, match='it holds several images, "a:1", "b:1", "b:2"'):
        import_image(state, io.BytesIO(data), name="c:9")
