"""How a layer comes into the store: unpacked, verified, durable, and only then under its name."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from polytropo.errors import storage_errors
from polytropo.host import host_ownership
from polytropo.images.errors import ImageError
from polytropo.images.extract import Extractor
from polytropo.images.layers import LayerRecord, get_layer, layer_directory
from polytropo.images.streams import PADDING_BYTES_MAX, DigestReader, Readable, decompressed, drain
from polytropo.images.syscalls import sync_filesystem
from polytropo.images.tar_reader import TarReader
from polytropo.state import HeldLock, State, fsync_directory, write_record


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
