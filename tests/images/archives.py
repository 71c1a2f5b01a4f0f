"""Makes layers, layouts and archives for the tests, sound ones and hostile ones."""

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zstandard

Content = bytes | str | None
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "tar+gzip": lambda data: gzip.compress(data, 1, mtime=0),
    "tar+zstd": lambda data: zstandard.ZstdCompressor().compress(data),
}


def member(name: str, data: bytes | None = None, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A regular file, or whatever `fields` (of `tarfile.TarInfo`) make it."""
    info = tarfile.TarInfo(name)
    info.size = len(data or b"")
    info.mode = 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data or b""


def directory(name: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, None, **{"type": tarfile.DIRTYPE, "mode": 0o755, **fields})


def symlink(name: str, target: str, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, None, **{"type": tarfile.SYMTYPE, "linkname": target, "mode": 0o777, **fields})


def hard_link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive of `members`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config_of(layers: list[bytes], **config: Any) -> dict[str, Any]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
    }


class Layout:
    """An OCI image layout in a directory, made by hand so that any part of it can be wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self.manifests: list[dict[str, Any]] = []

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        digest = sha256(data)
        (self.path / "blobs" / digest.replace(":", "/")).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def json_blob(self, value: Any, media_type: str) -> dict[str, Any]:
        return self.blob(json.dumps(value).encode(), media_type)

    def manifest(
        self, layers: list[bytes], packing: str = "tar+gzip", config: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Adds an image's blobs and returns the descriptor of its manifest."""
        value = {
            "schemaVersion": 2,
            "config": self.json_blob(
                config_of(layers) if config is None else config, "application/vnd.oci.image.config.v1+json"
            ),
            "layers": [
                self.blob(PACKERS[packing](layer), f"application/vnd.oci.image.layer.v1.{packing}")
                for layer in layers
            ],
        }
        return self.json_blob(value, "application/vnd.oci.image.manifest.v1+json")

    def index(self, *manifests: dict[str, Any]) -> "Layout":
        self.manifests += manifests
        (self.path / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": self.manifests}), encoding="utf-8"
        )
        return self

    def image(
        self, layers: list[bytes], packing: str = "tar+gzip", ref: str = "", **options: Any
    ) -> "Layout":
        """Adds an image and puts it into the index."""
        descriptor = self.manifest(layers, packing, **options)
        if ref:
            descriptor["annotations"] = {"org.opencontainers.image.ref.name": ref}
        return self.index(descriptor)


def tree_of(top: Path) -> dict[bytes, tuple[Any, ...]]:
    """Everything that can be seen of a tree: by name its type, mode, owner, time, data, links, attributes."""
    found: dict[bytes, tuple[Any, ...]] = {}
    first_names: dict[int, bytes] = {}
    waiting = [os.fsencode(top)]
    base = len(waiting[0]) + 1
    while waiting:
        path = waiting.pop(0)
        status = os.lstat(path)
        name = path[base:]
        data: Any = None
        if stat.S_ISREG(status.st_mode):
            data = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            data = os.readlink(path)  # noqa: PTH115
        elif stat.S_ISDIR(status.st_mode):
            waiting += sorted(entry.path for entry in os.scandir(path))
        first = first_names.setdefault(status.st_ino, name)
        xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        }
        found[name] = (
            oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, status.st_mtime_ns,
            data, first if first != name else None, xattrs,
        )  # fmt: skip
    return found
