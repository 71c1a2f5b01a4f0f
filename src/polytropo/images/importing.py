"""Brings images into the store from layouts and archives."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from polytropo.errors import storage_errors
from polytropo.images.blobs import DirectoryBlobs
from polytropo.images.errors import ImageError, shown
from polytropo.images.layers import use_layers
from polytropo.images.oci import INDEX, LAYOUT, Descriptor, import_manifest, read_index
from polytropo.images.progress import Meter, Progress, silent
from polytropo.images.references import is_name, name_from_file, normalized
from polytropo.images.store import Image
from polytropo.state import State


def import_image(
    state: State, source: Path | IO[bytes], *, name: str | None = None, progress: Progress = silent
) -> list[Image]:
    """Imports the image (or images) at `source`; layers that are there already are not read again.

    `name` names a single image; without it the archive's own names are used. Raises ImageError.
    """
    wanted = None if name is None else normalized(name)
    label = source if isinstance(source, Path) else Path("standard input")
    with _told_source(str(label)), storage_errors("import the image", label):
        if isinstance(source, Path) and source.is_dir():
            return _import_layout(state, source, wanted, Meter(progress))
        raise ImageError("it is no OCI image layout")


def _import_layout(state: State, directory: Path, wanted: str | None, meter: Meter) -> list[Image]:
    if not (directory / INDEX).exists():
        raise ImageError(
            f"it is a directory without {INDEX} and {LAYOUT}; give an OCI image layout, or a tar archive"
        )
    blobs = DirectoryBlobs(directory)
    try:
        with use_layers(state):
            chosen = _choose_images(read_index(blobs), wanted, directory.resolve().name)
            return [import_manifest(state, blobs, each, names, meter) for each, names in chosen]
    finally:
        blobs.close()


def _choose_images(
    manifests: list[Descriptor], wanted: str | None, file_name: str
) -> list[tuple[Descriptor, list[str]]]:
    """Which images of an index to import, each with its names."""
    if wanted is not None:
        if len(manifests) > 1:
            tag = wanted.rpartition(":")[2]
            tagged = [each for each in manifests if each.ref_name in (wanted, tag)]
            if len(tagged) != 1:
                there = ", ".join(shown(each.ref_name) for each in manifests)
                raise ImageError(
                    f"it holds several images, {there}; import it without a name, or with one's tag"
                )
            manifests = tagged
        return [(manifests[0], [wanted])]
    return [(each, [_own_name(each.ref_name, file_name)]) for each in manifests]


def _own_name(ref_name: str, file_name: str) -> str:
    """The name that the index gives an image; where that is a tag alone, the file's name comes before it."""
    if is_name(ref_name) and (":" in ref_name or "/" in ref_name):
        return normalized(ref_name)
    base = name_from_file(file_name)
    reference = f"{base}:{ref_name}" if ref_name else base
    if base is None or reference is None or not is_name(reference):
        raise ImageError("it does not say its name; give one with --name NAME")
    return normalized(reference)


@contextmanager
def _told_source(source: str) -> Iterator[None]:
    """Problems of an archive begin with what was to be imported."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"cannot import {shown(source)}: {error.sentence}") from error
