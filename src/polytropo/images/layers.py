"""The layer store: each layer's tree once, named by the digest of its uncompressed tar archive."""

import re
from contextlib import suppress
from pathlib import Path

from polytropo.compose import Ownership
from polytropo.errors import storage_errors
from polytropo.images.errors import ImageError
from polytropo.state import HeldLock, Record, State, read_record
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


def remove_layer(state: State, diff_id: str) -> None:
    """Removes a layer; the caller holds the lock `layers` and knows that nothing uses it."""
    with (
        storage_errors("remove a layer", state.layers),
        state.scratch("layer") as scratch,
        suppress(FileNotFoundError),
    ):
        layer_directory(state, diff_id).rename(scratch.path / "layer")
        remove_tree(scratch.path / "layer")
