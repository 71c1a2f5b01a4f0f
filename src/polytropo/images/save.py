"""Writes an image as an archive: an OCI layout in a tar, with the manifest that `docker load` reads."""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from polytropo.errors import storage_errors
from polytropo.images.blobs import blob_path
from polytropo.images.docker import MANIFEST
from polytropo.images.errors import ImageError
from polytropo.images.flatten import flattened
from polytropo.images.layers import LayerRecord, layer_tree, use_layers
from polytropo.images.oci import INDEX, LAYOUT
from polytropo.images.ownership import Attributes
from polytropo.images.progress import Meter, Progress, silent
from polytropo.images.store import Image
from polytropo.images.tar_reader import BLOCK_BYTES
from polytropo.images.tar_writer import END, header
from polytropo.images.walk import Tree
from polytropo.state import State, fsync_directory

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class _Blob:
    """A part of the archive; a layer's bytes are made again when they are written."""

    digest: str
    size_bytes: int
    content: bytes | None
    layer: LayerRecord | None = None

    def described(self, media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": self.digest, "size": self.size_bytes}


def save(state: State, image: Image, target: Path | IO[bytes], *, progress: Progress = silent) -> None:
    """Writes the image to a file, which then is there whole or not at all, or to a stream.

    Layers are packed anew from their trees. Where that gives other bytes than those that were imported,
    the image in the archive has another digest, and the same files. Raises ImageError or StorageError.
    """
    with use_layers(state):
        if not isinstance(target, Path):
            _write(state, image, target, Meter(progress))
            return
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        with storage_errors("save the image", target.parent):
            try:
                with temporary.open("xb") as file:
                    _write(state, image, file, Meter(progress))
                    file.flush()
                    os.fsync(file.fileno())
                temporary.rename(target)
                fsync_directory(target.parent)
            finally:
                temporary.unlink(missing_ok=True)


def _write(state: State, image: Image, file: IO[bytes], meter: Meter) -> None:
    layers = [_layer_blob(state, record) for record in image.layer_records]
    meter.expect(sum(layer.size_bytes for layer in layers))
    config = json.loads(image.config_json)
    if config["rootfs"]["diff_ids"] == [layer.digest for layer in layers]:
        config_blob = _blob(image.config_json.encode())
    else:
        config["rootfs"]["diff_ids"] = [layer.digest for layer in layers]
        config_blob = _json_blob(config)
    manifest = _json_blob(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": config_blob.described(_CONFIG_TYPE),
            "layers": [layer.described(_LAYER_TYPE) for layer in layers],
        }
    )
    _write_file(file, LAYOUT, _json_blob({"imageLayoutVersion": "1.0.0"}))
    _write_file(file, INDEX, _json_blob(_index(image, manifest)))
    _write_file(file, MANIFEST, _json_blob(_docker_manifest(image, config_blob, layers)))
    written = set()
    for blob in (manifest, config_blob, *layers):
        if blob.digest in written:
            continue
        written.add(blob.digest)
        told = meter.part(blob.size_bytes if blob.layer else 0)
        if blob.layer is None:
            _write_file(file, blob_path(blob.digest), blob)
        else:
            _write_layer(state, file, blob, blob.layer)
            told(blob.size_bytes)
    file.write(END)


def _index(image: Image, manifest: _Blob) -> dict[str, Any]:
    described = manifest.described(_MANIFEST_TYPE)
    key = "org.opencontainers.image.ref.name"
    entries = [described | {"annotations": {key: name}} for name in image.names] or [described]
    return {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": entries}


def _docker_manifest(image: Image, config: _Blob, layers: list[_Blob]) -> list[dict[str, Any]]:
    paths = [blob_path(layer.digest) for layer in layers]
    return [{"Config": blob_path(config.digest), "RepoTags": image.names, "Layers": paths}]


def _layer_blob(state: State, record: LayerRecord) -> _Blob:
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in _layer_bytes(state, record):
        digest.update(chunk)
        size_bytes += len(chunk)
    return _Blob(f"sha256:{digest.hexdigest()}", size_bytes, None, record)


def _layer_bytes(state: State, record: LayerRecord) -> Iterator[bytes]:
    with Tree(layer_tree(state, record.diff_id), record.ownership) as tree:
        yield from flattened(tree, [])


def _write_layer(state: State, file: IO[bytes], blob: _Blob, record: LayerRecord) -> None:
    file.write(_file_header(blob_path(blob.digest), blob.size_bytes))
    written = 0
    for chunk in _layer_bytes(state, record):
        file.write(chunk)
        written += len(chunk)
    if written != blob.size_bytes:
        raise ImageError(f"the layer {record.diff_id} changed while it was saved; import its image again")
    file.write(bytes(-written % BLOCK_BYTES))


def _write_file(file: IO[bytes], path: str, blob: _Blob) -> None:
    content = blob.content or b""
    file.write(_file_header(path, len(content)) + content + bytes(-len(content) % BLOCK_BYTES))


def _file_header(path: str, size_bytes: int) -> bytes:
    return header(path.encode(), Attributes(stat.S_IFREG | 0o644, 0, 0, 0, 0, {}), size_bytes=size_bytes)


def _json_blob(value: Any) -> _Blob:
    return _blob(json.dumps(value, separators=(",", ":")).encode())


def _blob(content: bytes) -> _Blob:
    return _Blob(f"sha256:{hashlib.sha256(content).hexdigest()}", len(content), content)
