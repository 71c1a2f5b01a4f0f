"""Brings images into the store from layouts and archives."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from polytropo.errors import storage_errors
from polytropo.images.archives import SpooledBlobs, TarFileBlobs, holds_images
from polytropo.images.blobs import Blobs, DirectoryBlobs, FileReader, open_regular
from polytropo.images.docker import MANIFEST, SavedImage, import_saved, read_manifest
from polytropo.images.errors import ImageError, shown
from polytropo.images.layers import LayerRecord, use_layers
from polytropo.images.oci import INDEX, LAYOUT, Descriptor, import_manifest, read_index
from polytropo.images.progress import Meter, Progress, silent
from polytropo.images.references import is_name, name_from_file, normalized
from polytropo.images.store import Image, add_image
from polytropo.images.streams import ChunkReader, DigestReader, Readable, compression_of, decompressed
from polytropo.images.unpacking import add_unknown_layer
from polytropo.state import State

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAGIC_BYTES = 6
_NO_NAME = "it does not say its name; give one with --name NAME"


def import_image(
    state: State, source: Path | IO[bytes], *, name: str | None = None, progress: Progress = silent
) -> list[Image]:
    """Imports the image, or images, of a layout, an image archive or the tar of a root filesystem.

    `source` is a path or a stream, which is read once from where it stands. `name` names a single image;
    without it the archive's own names are used. Layers that are there already are not unpacked again.
    Raises ImageError, or StorageError if the state directory takes no more.
    """
    place = source if isinstance(source, Path) else None
    with _told_source("standard input" if place is None else str(place)):
        wanted = None if name is None else normalized(name)
        importer = _Importer(state, wanted, place, Meter(progress))
        with use_layers(state):
            if not isinstance(source, Path):
                return importer.from_stream(_Stream(source))
            with storage_errors("read the image", source):
                return importer.from_path(source)


class _Importer:
    def __init__(self, state: State, wanted: str | None, place: Path | None, meter: Meter) -> None:
        self._state = state
        self._wanted = wanted
        self._base = None if place is None else name_from_file(place.resolve().name)
        self._meter = meter

    def from_path(self, place: Path) -> list[Image]:
        if place.is_dir():
            return self._from_layout(place)
        if not place.is_file():  # a pipe has no place to come back to
            with place.open("rb", buffering=0) as stream:
                return self.from_stream(stream)
        descriptor = open_regular(place)
        try:
            size_bytes = os.fstat(descriptor).st_size
            if compression_of(os.pread(descriptor, _MAGIC_BYTES, 0)) == "none":
                head = ChunkReader.of(FileReader(descriptor, 0, size_bytes))
                if holds_images(head):
                    return self._from_blobs(TarFileBlobs(descriptor))
            self._meter.expect(size_bytes)
            return self.from_stream(FileReader(descriptor, 0, size_bytes))
        finally:
            os.close(descriptor)

    def from_stream(self, source: Readable) -> list[Image]:
        told = DigestReader(source, self._meter.part(None))
        stream = decompressed(told)
        if not holds_images(stream):
            return [self._from_root_filesystem(stream)]
        with (
            storage_errors("spool the image", self._state.home),
            self._state.scratch("archive") as scratch,
        ):
            return self._from_blobs(SpooledBlobs(stream, scratch.path))

    def _from_layout(self, directory: Path) -> list[Image]:
        if not (directory / INDEX).exists():
            raise ImageError(
                f"it is a directory without {INDEX} and {LAYOUT}; give an OCI image layout, or a tar archive"
            )
        return self._from_blobs(DirectoryBlobs(directory))

    def _from_blobs(self, blobs: Blobs) -> list[Image]:
        try:
            if blobs.has(INDEX):
                chosen = self._choose_manifests(read_index(blobs))
                return [import_manifest(self._state, blobs, *each, self._meter) for each in chosen]
            if blobs.has(MANIFEST):
                saved = self._choose_saved(read_manifest(blobs))
                return [import_saved(self._state, blobs, *each, self._meter) for each in saved]
        finally:
            blobs.close()
        raise ImageError(f"it looks like an image archive, but has no {INDEX} or {MANIFEST}")

    def _from_root_filesystem(self, stream: Readable) -> Image:
        name = self._wanted or (f"{self._base}:latest" if self._base else None)
        if name is None:
            raise ImageError(_NO_NAME)
        layer = add_unknown_layer(self._state, stream, needs_end=True)
        return add_image(self._state, root_config([layer]), [name])

    def _choose_manifests(self, manifests: list[Descriptor]) -> list[tuple[Descriptor, list[str]]]:
        """Which images of an index to import, each with its names."""
        images: dict[str, Descriptor] = {}
        ref_names: dict[str, list[str]] = {}
        for each in manifests:  # one with several names is there several times
            images.setdefault(each.digest, each)
            ref_names.setdefault(each.digest, []).append(each.ref_name)
        if self._wanted is None:
            return [
                (each, [self._own_name(name) for name in ref_names[digest]])
                for digest, each in images.items()
            ]
        chosen = self._choose(list(ref_names.values()), self._wanted)
        return [(list(images.values())[chosen], [self._wanted])]

    def _choose_saved(self, images: list[SavedImage]) -> list[tuple[SavedImage, list[str]]]:
        """Which images of a docker archive to import, each with its names."""
        if self._wanted is None:
            return [(each, self._own_names(each.repo_tags or [])) for each in images]
        chosen = self._choose([each.repo_tags or [] for each in images], self._wanted)
        return [(images[chosen], [self._wanted])]

    def _choose(self, offered: list[list[str]], wanted: str) -> int:
        """The place of the one image there is, or of the one among several that `wanted` means."""
        if len(offered) == 1:
            return 0
        tag = wanted.rpartition(":")[2]
        for meant in (wanted, tag):
            found = [i for i, names in enumerate(offered) if meant in names]
            if len(found) == 1:
                return found[0]
        there = ", ".join(shown(name) for names in offered for name in names)
        raise ImageError(f"it holds several images, {there}; import it without --name, or with one of these")

    def _own_names(self, names: list[str]) -> list[str]:
        return [normalized(name) for name in names] or [self._own_name("")]

    def _own_name(self, ref_name: str) -> str:
        """The name that an index gives; where that is a tag alone, the file's name comes before it."""
        if is_name(ref_name) and (":" in ref_name or "/" in ref_name):
            return normalized(ref_name)
        reference = f"{self._base}:{ref_name}" if ref_name else self._base
        if self._base is None or reference is None or not is_name(reference):
            raise ImageError(_NO_NAME)
        return normalized(reference)


def root_config(layers: list[LayerRecord], command: str = "/bin/sh") -> bytes:
    """The configuration of an image that is made from plain files. The same files give the same digest."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Env": [DEFAULT_PATH], "Cmd": [command]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    return json.dumps(config, separators=(",", ":")).encode()


class _Stream:
    """A Python file as a `Readable`: gives what there is instead of waiting for all that was asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._read: Callable[[int], bytes] = getattr(file, "read1", file.read)

    def read(self, size: int, /) -> bytes:
        return self._read(size)


@contextmanager
def _told_source(source: str) -> Iterator[None]:
    """Problems of an archive begin with what was to be imported."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"cannot import {shown(source)}: {error.sentence}") from error
