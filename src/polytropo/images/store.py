"""The images of a state directory: records, names, what they mean."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from polytropo.compose import Dir
from polytropo.errors import PolytropoError, storage_errors
from polytropo.images.config import ImageConfig, parse_config
from polytropo.images.errors import ImageError, shown
from polytropo.images.layers import (
    LayerRecord,
    check_digest,
    get_layer,
    layer_tree,
    remove_layer,
)
from polytropo.images.references import id_prefix, normalized
from polytropo.names import unknown
from polytropo.state import Record, State, fsync_directory, read_record, write_record

# Removing what nobody needs may wait for the next prune; a person may not.
_CLEAR_TIMEOUT_S = 0.5


class ImageRecord(Record, kw_only=True):
    """One image, kept as images/DIGEST.json."""

    digest: str
    names: dict[str, float]  # to when it got them; of two images with one name the later one has it
    config_json: str  # as it came, so that its digest stays what it is
    imported_unix_s: float
    manifest_digest: str | None = None


class Image(msgspec.Struct, frozen=True):
    """An image in the store."""

    digest: str
    names: list[str]
    config: ImageConfig
    config_json: str
    diff_ids: list[str]
    """The layers' digests, the lowest first, as in the image's configuration."""
    layers: list[Path]
    """The layers' trees, the topmost first, as a union takes them."""
    layer_records: list[LayerRecord]
    """The layers' records, the lowest first."""
    architecture: str
    created: str
    imported_unix_s: float
    manifest_digest: str | None

    @property
    def id(self) -> str:
        """The first twelve digits of the digest."""
        return self.digest.removeprefix("sha256:")[:12]

    @property
    def size_bytes(self) -> int:
        """The bytes in all layers' files."""
        return sum(record.size_bytes for record in self.layer_records)

    @property
    def dirs(self) -> list[Dir]:
        """The layers for a stack, the topmost first."""
        owned = zip(self.layers, reversed(self.layer_records), strict=True)
        return [
            Dir(path, read_only=True, coherence="immutable", ownership=record.ownership)
            for path, record in owned
        ]


def get_image(state: State, reference: str) -> Image:
    """The image that `reference` names: NAME[:TAG], the beginning of an id, NAME@DIGEST.

    A name may leave out the host and path in front of it (`debian` finds `docker.io/library/debian`).
    Raises ImageError, which lists what there is.
    """
    return load(state, find_record(state, reference))


def list_images(state: State) -> list[Image]:
    """All images whose layers are there, the latest first; `damaged_images` tells of others."""
    found = []
    for record in sorted(_records(state), key=lambda record: -record.imported_unix_s):
        with suppress(ImageError):
            found.append(load(state, record))
    return found


def damaged_images(state: State) -> list[str]:
    """A sentence for each image that cannot be used."""
    sentences = []
    for record in _records(state):
        try:
            load(state, record)
        except ImageError as error:
            sentences.append(error.sentence)
    return sentences


def tag_image(state: State, reference: str, name: str) -> Image:
    """Gives the image another name, taking it from the image that had it."""
    wanted = normalized(name)
    with state.lock("images"):
        record = find_record(state, reference)
        _name(state, record, [wanted])
    return load(state, record)


def remove_image(
    state: State,
    reference: str,
    *,
    users: Callable[[str], list[str]] = lambda digest: [],
    force: bool = False,
) -> str | None:
    """Takes the name from the image, and removes the image with its last name. Returns its digest if so.

    `users` names the containers that use an image. One that is used, or that is meant by its id but has
    several names, loses all its names with `force`; while it is used it stays, without a name.
    """
    with state.lock("images"):
        record = find_record(state, reference)
        name = _meant_name(state, record, reference)
        if name is not None and len(record.names) > 1:
            del record.names[name]
            write_record(_path(state, record.digest), record)
            return None
        if name is None and len(record.names) > 1 and not force:
            raise ImageError(
                f"the image {shown(reference)} has the names {', '.join(sorted(record.names))};"
                " remove these one by one, or all with --force"
            )
        if used := users(record.digest):
            if not force:
                raise ImageError(
                    f"the image {shown(reference)} is used by the container {', '.join(used)};"
                    " remove that first, or take the image's names away with --force"
                )
            record.names = {}
            write_record(_path(state, record.digest), record)
            return None
        _forget(state, record)
    with suppress(PolytropoError):  # an import is running: the next prune finds what this one left
        clear_unused_layers(state, timeout_s=_CLEAR_TIMEOUT_S)
    return record.digest


def add_image(
    state: State, config_json: bytes, names: list[str], *, manifest_digest: str | None = None
) -> Image:
    """Records an image whose layers are in the store, and names it. The caller holds `use_layers`."""
    import hashlib

    digest = f"sha256:{hashlib.sha256(config_json).hexdigest()}"
    parse_config(config_json)
    with state.lock("images"):
        try:
            record = read_record(_path(state, digest), ImageRecord)
        except FileNotFoundError:
            record = ImageRecord(
                digest=digest,
                names={},
                config_json=config_json.decode(),
                imported_unix_s=time.time(),
                manifest_digest=manifest_digest,
            )
        _name(state, record, names)
    return load(state, record)


def load(state: State, record: ImageRecord) -> Image:
    """The image that a record describes. Raises ImageError if a layer is missing."""
    parsed = parse_config(record.config_json.encode())
    records = []
    for diff_id in parsed.diff_ids:
        try:
            records.append(get_layer(state, diff_id))
        except FileNotFoundError:
            raise ImageError(
                f"the image {record.digest[7:19]} lacks its layer {diff_id}; remove it and import it again"
            ) from None
    return Image(
        digest=record.digest,
        names=sorted(record.names),
        config=parsed.run,
        config_json=record.config_json,
        diff_ids=parsed.diff_ids,
        layers=[layer_tree(state, diff_id) for diff_id in reversed(parsed.diff_ids)],
        layer_records=records,
        architecture=parsed.architecture,
        created=parsed.created,
        imported_unix_s=record.imported_unix_s,
        manifest_digest=record.manifest_digest,
    )


def find_record(state: State, reference: str) -> ImageRecord:
    """The record that `reference` means; raises ImageError."""
    records = _records(state)
    _, at, digest = reference.partition("@")
    if at:
        records = [r for r in records if digest in (r.digest, r.manifest_digest)]
        if len(records) == 1:
            return records[0]
    else:
        if found := _by_name(records, reference):
            return found
        if found := _by_id(records, reference):
            return found
    known = sorted(name for record in records for name in record.names)
    raise ImageError(unknown("image", reference, known, "make one with `polytropo image bootstrap`").sentence)


def clear_unused_layers(state: State, *, timeout_s: float | None = None) -> list[LayerRecord]:
    """Removes layers that no image has and no mounted stack shows.

    Raises PolytropoError if imports keep running for `timeout_s`, or a service does not answer.
    """
    from polytropo.images.layers import list_layers
    from polytropo.lifecycle import mounted_directories

    with state.lock("layers", timeout_s=timeout_s):
        used = {diff_id for r in _records(state) for diff_id in parse_config(r.config_json.encode()).diff_ids}
        mounted = mounted_directories(state)
        unused = [
            record
            for record in list_layers(state)
            if record.diff_id not in used and str(layer_tree(state, record.diff_id)) not in mounted
        ]
        for record in unused:
            remove_layer(state, record.diff_id)
    return unused


def clear_unnamed_images(state: State, users: Callable[[str], list[str]]) -> list[str]:
    """Removes images that have neither a name nor a container; returns their digests."""
    with state.lock("images"):
        unnamed = [record for record in _records(state) if not record.names and not users(record.digest)]
        for record in unnamed:
            _forget(state, record)
    return [record.digest for record in unnamed]


def _by_name(records: list[ImageRecord], reference: str) -> ImageRecord | None:
    try:
        wanted = normalized(reference)
    except ImageError:
        if id_prefix(reference):
            return None
        raise
    matching = {}
    for record in records:
        for name in record.names:
            if name == wanted:
                return record
            if name.endswith(f"/{wanted}"):
                matching[name] = record
    if len({record.digest for record in matching.values()}) > 1:
        raise ImageError(f"{shown(reference)} could be {', '.join(sorted(matching))}; write the whole name")
    return next(iter(matching.values()), None)


def _by_id(records: list[ImageRecord], reference: str) -> ImageRecord | None:
    prefix = id_prefix(reference)
    if prefix is None:
        return None
    found = [r for r in records if r.digest.removeprefix("sha256:").startswith(prefix)]
    if len(found) > 1:
        raise ImageError(f"several images have ids that begin with {prefix}; write more of it")
    return found[0] if found else None


def _meant_name(state: State, record: ImageRecord, reference: str) -> str | None:
    """Which of the image's names `reference` stands for; None if it is an id."""
    if "@" in reference or (id_prefix(reference) and _by_name([record], reference) is None):
        return None
    wanted = normalized(reference)
    if wanted in record.names:
        return wanted
    return next((name for name in sorted(record.names) if name.endswith(f"/{wanted}")), None)


def _name(state: State, record: ImageRecord, names: list[str]) -> None:
    """Writes `record` with `names` added, then takes these from others. The caller holds the lock."""
    now = time.time()
    record.names |= dict.fromkeys(names, now)
    with storage_errors("record an image", state.home):
        write_record(_path(state, record.digest), record)
        for other in _records(state):
            if other.digest != record.digest and other.names.keys() & set(names):
                other.names = {name: since for name, since in other.names.items() if name not in names}
                write_record(_path(state, other.digest), other)


def _records(state: State) -> list[ImageRecord]:
    """All records; a name that two have, since somebody was killed between two writes, is the later one's."""
    records = []
    with storage_errors("list the images", state.images):
        for path in sorted(state.images.glob("*.json")):
            with suppress(FileNotFoundError):
                records.append(read_record(path, ImageRecord))
    latest: dict[str, float] = {}
    for record in records:
        for name, since in record.names.items():
            latest[name] = max(since, latest.get(name, since))
    for record in records:
        record.names = {name: since for name, since in record.names.items() if since >= latest[name]}
    return records


def _forget(state: State, record: ImageRecord) -> None:
    with storage_errors("remove an image", state.images):
        _path(state, record.digest).unlink(missing_ok=True)
        fsync_directory(state.images)


def _path(state: State, digest: str) -> Path:
    return state.images / f"{check_digest(digest, 'an image').removeprefix('sha256:')}.json"
