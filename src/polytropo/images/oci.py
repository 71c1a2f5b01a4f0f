"""Reads OCI image layouts: index, manifests, configuration; picks the image for this machine."""

from typing import Any

import msgspec

from polytropo.images.blobs import Blobs, blob_path, open_blob, read_document
from polytropo.images.config import check_architecture, parse_config
from polytropo.images.errors import ImageError, shown
from polytropo.images.layers import check_digest
from polytropo.images.progress import Meter
from polytropo.images.store import Image, add_image
from polytropo.images.unpacking import add_layer
from polytropo.state import State

LAYOUT = "oci-layout"
INDEX = "index.json"
_NESTED_MAX = 4
_MANIFESTS_MAX = 1000
_REF_NAMES = ("io.containerd.image.name", "org.opencontainers.image.ref.name")
_INDEX_TYPES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_MANIFEST_TYPES = {
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
}
_CONFIG_TYPES = {
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
}


class Platform(msgspec.Struct):
    architecture: str = ""
    os: str = ""


class Descriptor(msgspec.Struct, rename="camel"):
    digest: str
    size: int = 0
    media_type: str = ""
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def ref_name(self) -> str:
        """The name or tag that the index gives this image, or nothing."""
        found = (self.annotations or {}).get
        return next((name for key in _REF_NAMES if (name := found(key))), "")


class _Index(msgspec.Struct, rename="camel"):
    manifests: list[Descriptor]
    schema_version: int = 2


class _Manifest(msgspec.Struct, rename="camel"):
    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = 2


class _Layout(msgspec.Struct, rename="camel"):
    image_layout_version: str = ""


def read_index(blobs: Blobs) -> list[Descriptor]:
    """The images in a layout. Raises ImageError."""
    if blobs.has(LAYOUT):
        version = _decode(read_document(blobs, LAYOUT), _Layout, LAYOUT).image_layout_version
        if version.partition(".")[0] not in ("1", ""):
            raise ImageError(f"its image layout has version {shown(version)}; only 1 is known")
    index = _decode(read_document(blobs, INDEX), _Index, INDEX)
    if not index.manifests or len(index.manifests) > _MANIFESTS_MAX:
        raise ImageError(f"its index holds {len(index.manifests)} images; 1 to {_MANIFESTS_MAX} are possible")
    manifests: list[Descriptor] = index.manifests
    return manifests


def import_manifest(
    state: State, blobs: Blobs, descriptor: Descriptor, names: list[str], meter: Meter
) -> Image:
    """Stores the image that a descriptor leads to. The caller holds `use_layers`. Raises ImageError."""
    manifest, manifest_digest = _read_manifest(blobs, descriptor, depth=0)
    _check_types(manifest)
    config_digest = check_digest(manifest.config.digest, "its configuration")
    config = read_document(blobs, blob_path(config_digest), config_digest)
    diff_ids = parse_config(config).diff_ids
    if len(diff_ids) != len(manifest.layers):
        raise ImageError(
            f"its manifest has {len(manifest.layers)} layers, its configuration {len(diff_ids)};"
            " get a sound copy"
        )
    meter.expect(sum(layer.size for layer in manifest.layers))
    for layer, diff_id in zip(manifest.layers, diff_ids, strict=True):
        digest = check_digest(layer.digest, "a layer in its manifest")
        told = meter.part(layer.size)
        add_layer(
            state,
            lambda digest=digest, told=told: open_blob(blobs, blob_path(digest), told),  # type: ignore[misc]
            diff_id,
            blob_digest=digest,
        )
        told(layer.size)
    return add_image(state, config, names, manifest_digest=manifest_digest)


def _read_manifest(blobs: Blobs, descriptor: Descriptor, depth: int) -> tuple[_Manifest, str]:
    digest = check_digest(descriptor.digest, "a manifest in its index")
    path = blob_path(digest)
    content = read_document(blobs, path, digest)
    value = _decode(content, dict[str, Any], path)
    media_type = value.get("mediaType") or descriptor.media_type
    if media_type in _INDEX_TYPES or "manifests" in value:
        if depth >= _NESTED_MAX:
            raise ImageError(f"its indexes are nested deeper than {_NESTED_MAX}")
        return _read_manifest(blobs, _choose(_decode(content, _Index, path).manifests), depth + 1)
    if value.get("schemaVersion") != 2 or (media_type and media_type not in _MANIFEST_TYPES):
        raise ImageError(f"its manifest is of the unknown type {shown(str(media_type))}")
    return _decode(content, _Manifest, path), digest


def _choose(manifests: list[Descriptor]) -> Descriptor:
    """The one for this machine."""
    offered = []
    for each in manifests:
        platform = each.platform or Platform()
        if platform.os in ("", "linux"):
            try:
                check_architecture(platform.architecture)
                return each
            except ImageError:
                pass
        offered.append(f"{platform.os}/{platform.architecture}")
    raise ImageError(
        f"it has images for {', '.join(sorted(set(offered))) or 'nothing'};"
        " this program runs images for linux/amd64"
    )


def _check_types(manifest: _Manifest) -> None:
    if manifest.config.media_type and manifest.config.media_type not in _CONFIG_TYPES:
        raise ImageError(f"it is no container image, but holds {shown(manifest.config.media_type)}")
    for layer in manifest.layers:
        kind = layer.media_type
        if "nondistributable" in kind or ".foreign." in kind:
            raise ImageError(
                f"its layer {layer.digest:.80} is kept elsewhere (a foreign layer);"
                " use an image that has all its layers"
            )
        if "encrypted" in kind:
            raise ImageError(f"its layer {layer.digest:.80} is encrypted; decrypt the image first")


def _decode(content: bytes, kind: Any, path: str) -> Any:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ImageError(f"its {shown(path)} is damaged ({error}); get a sound copy") from None
