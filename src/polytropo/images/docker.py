"""Reads what `docker save` and `podman save` write: manifest.json, configurations, layers."""

import re

import msgspec

from polytropo.images.blobs import Blobs, open_blob, read_document
from polytropo.images.config import parse_config
from polytropo.images.errors import ImageError, shown
from polytropo.images.progress import Meter
from polytropo.images.store import Image, add_image
from polytropo.images.unpacking import add_layer
from polytropo.state import State

MANIFEST = "manifest.json"
_IMAGES_MAX = 1000
_NAMED_BY_DIGEST = re.compile(r"(?:blobs/sha256/)?([0-9a-f]{64})(?:\.json)?")


class SavedImage(msgspec.Struct, rename="pascal"):
    """One image of the archive; `config` and `layers` are names in it."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


def read_manifest(blobs: Blobs) -> list[SavedImage]:
    """The images in the archive. Raises ImageError."""
    try:
        images = msgspec.json.decode(read_document(blobs, MANIFEST), type=list[SavedImage])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ImageError(f"its {MANIFEST} is damaged ({error}); get a sound copy") from None
    if not 1 <= len(images) <= _IMAGES_MAX:
        raise ImageError(f"it holds {len(images)} images; 1 to {_IMAGES_MAX} are possible")
    return images


def import_saved(state: State, blobs: Blobs, saved: SavedImage, names: list[str], meter: Meter) -> Image:
    """Stores one image. The caller holds `use_layers`. Raises ImageError."""
    named = _NAMED_BY_DIGEST.fullmatch(saved.config)
    config = read_document(blobs, saved.config, f"sha256:{named[1]}" if named else None)
    diff_ids = parse_config(config).diff_ids
    if len(diff_ids) != len(saved.layers):
        raise ImageError(
            f"its {MANIFEST} has {len(saved.layers)} layers, its configuration {len(diff_ids)};"
            " get a sound copy"
        )
    for path, diff_id in zip(saved.layers, diff_ids, strict=True):
        if not blobs.has(path):
            raise ImageError(f"it lacks {shown(path)}; get a complete copy")
        size_bytes = blobs.open(path)[1]
        meter.expect(size_bytes)
        told = meter.part(size_bytes)
        add_layer(
            state,
            lambda path=path, told=told: open_blob(blobs, path, told),  # type: ignore[misc]
            diff_id,
        )
        told(size_bytes)
    return add_image(state, config, names)
