"""The layer store: each layer's tree once, named by the digest of its uncompressed tar archive."""

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polytropo.errors import storage_errors
from polytropo.host import host_ownership
from polytropo.images.errors import ImageError
from polytropo.images.extract import Extractor
from polytropo.images.ownership import Ownership
from polytropo.images.streams import PADDING_BYTES_MAX, DigestReader, Readable, decompressed, drain
from polytropo.images.syscalls import sync_filesystem
from polytropo.images.tar_reader import TarReader
from polytropo.state import HeldLock, Record, State, fsync_directory, read_record, write_record
from polytropo.trees import remove_tree

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class LayerRecord(Record, kw_only=True):
    """One layer, kept as layer.json."""

    diff_id: str
    ownership: Ownership
    entries: int
    size_bytes: int  # of the files' data, as the archive declares it


def check_digest(text: object, what: str) -> str:
    """`text` if it is a digest that we can verify. Raises ImageError."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ImageError(f"{what} has the digest {text!r:.100}; only sha256 is known")
    return text


def layer_directory(state: State, diff_id: str) -> Path:
    """Where a layer lies in the state directory."""
    return state.layers / "sha256" / check_digest(diff_id, "a layer").removeprefix("sha256:")


def layer_tree(state: State, diff_id: str) -> Path:
    """The directory that is the layer itself."""
    return layer_directory(state, diff_id) / "tree"


def get_layer(state: State, diff_id: str) -> LayerRecord:
    """The record of a layer; raises FileNotFoundError."""
    return read_record(layer_directory(state, diff_id) / "layer.json", LayerRecord)


def list_layers(state: State) -> list[LayerRecord]:
    """All layers in the store."""
    found = []
    with storage_errors("list the layers", state.layers):
        for path in sorted(state.layers.glob("sha256/*/layer.json")):
            with suppress(FileNotFoundError):
                found.append(read_record(path, LayerRecord))
    return found


def use_layers(state: State) -> HeldLock:
    """Keeps layers that no image names yet from being cleared, inside a `with`."""
    return state.lock("layers", shared=True)


def add_layer(
    state: State, open_source: Callable[[], Readable], diff_id: str, *, blob_digest: str | None = None
) -> LayerRecord:
    """Stores the layer `diff_id` from its archive, which is opened only if the layer is not there yet.

    The caller holds `use_layers`. Raises ImageError if the archive is damaged, hostile or another one.
    """
    with _lock(state, diff_id):
        with suppress(FileNotFoundError):
            return get_layer(state, diff_id)
        with _unpacked(state, open_source(), blob_digest) as (directory, record):
            if record.diff_id != diff_id:
                raise ImageError(
                    f"it unpacks to {record.diff_id}, but its configuration says {diff_id}; get a sound copy"
                )
            _publish(state, directory, record)
            return record


def add_unknown_layer(state: State, source: Readable, *, needs_end: bool) -> LayerRecord:
    """Stores the layer that `source` holds, whatever it is. The caller holds `use_layers`."""
    with (
        _unpacked(state, source, None, needs_end=needs_end) as (directory, record),
        _lock(state, record.diff_id),
    ):
        with suppress(FileNotFoundError):
            return get_layer(state, record.diff_id)
        _publish(state, directory, record)
        return record


def remove_layer(state: State, diff_id: str) -> None:
    """Removes a layer; the caller holds the lock `layers` and knows that nothing uses it."""
    with (
        storage_errors("remove a layer", state.layers),
        state.scratch("layer") as scratch,
        suppress(FileNotFoundError),
    ):
        layer_directory(state, diff_id).rename(scratch.path / "layer")
        remove_tree(scratch.path / "layer")


def _lock(state: State, diff_id: str) -> HeldLock:
    # A few locks for all layers, since the files of locks stay for ever.
    return state.lock(f"layer-{diff_id.removeprefix('sha256:')[:2]}")


@contextmanager
def _unpacked(
    state: State, source: Readable, blob_digest: str | None, *, needs_end: bool = False
) -> Iterator[tuple[Path, LayerRecord]]:
    """An archive's tree in a temporary directory, with the record that describes it."""
    with storage_errors("unpack a layer", state.home), state.scratch("layer") as scratch:
        directory = scratch.path / "layer"
        tree = directory / "tree"
        tree.mkdir(parents=True, mode=0o700)
        blob = DigestReader(source)
        archive = DigestReader(decompressed(blob))
        reader = TarReader(archive)
        ownership = host_ownership()
        with tempfile.TemporaryFile(dir=scratch.path) as spool:
            extractor = Extractor(tree, ownership, spool)
            extractor.run(reader)
        if needs_end and not reader.ended_properly:
            raise ImageError("its tar archive has no end; get a complete copy")
        drain(archive, PADDING_BYTES_MAX)
        drain(blob, PADDING_BYTES_MAX)
        if blob_digest is not None and blob.digest != blob_digest:
            raise ImageError(f"it has the digest {blob.digest} instead of {blob_digest}; get a sound copy")
        record = LayerRecord(
            diff_id=archive.digest,
            ownership=ownership,
            entries=extractor.entries,
            size_bytes=extractor.size_bytes,
        )
        yield directory, record


def _publish(state: State, directory: Path, record: LayerRecord) -> None:
    """Makes an unpacked layer durable and gives it its name."""
    final = layer_directory(state, record.diff_id)
    with storage_errors("store a layer", state.home):
        final.parent.mkdir(mode=0o700, exist_ok=True)
        write_record(directory / "layer.json", record)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sync_filesystem(descriptor)
        finally:
            os.close(descriptor)
        with suppress(FileNotFoundError):  # only if somebody has damaged it
            final.rename(directory.with_name("damaged"))
        directory.rename(final)
        fsync_directory(final.parent)
