"""What images take on disk, and clearing what nobody needs."""

from dataclasses import dataclass

from polytropo.images.layers import layer_directory, list_layers
from polytropo.images.store import clear_unnamed_images, clear_unused_layers, list_images
from polytropo.lifecycle import image_users
from polytropo.state import State
from polytropo.volumes import size_bytes


@dataclass(frozen=True)
class Pruned:
    """What `prune` removed."""

    images: int
    layers: int
    size_bytes: int

    @property
    def removed(self) -> int:
        return self.images + self.layers


@dataclass(frozen=True)
class ImageUsage:
    """What one image takes on disk: alone, and together with other images."""

    digest: str
    names: list[str]
    unique_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Usage:
    """What all images take on disk; each layer counts once in the total."""

    total_bytes: int
    unused_bytes: int
    images: list[ImageUsage]


def prune(state: State) -> Pruned:
    """Removes images that have neither name nor container, then layers that no image has.

    Waits for imports that are running. Raises PolytropoError.
    """
    images = clear_unnamed_images(state, lambda digest: image_users(state, digest))
    layers = clear_unused_layers(state)
    return Pruned(len(images), len(layers), sum(record.size_bytes for record in layers))


def df(state: State) -> Usage:
    """Measures the layers on disk."""
    sizes = {r.diff_id: size_bytes(layer_directory(state, r.diff_id)) for r in list_layers(state)}
    images = list_images(state)
    users = {diff_id: sum(diff_id in image.diff_ids for image in images) for diff_id in sizes}
    shown = []
    for image in images:
        own = set(image.diff_ids)
        shown.append(
            ImageUsage(
                digest=image.digest,
                names=image.names,
                unique_bytes=sum(sizes.get(each, 0) for each in own if users.get(each) == 1),
                shared_bytes=sum(sizes.get(each, 0) for each in own if users.get(each, 0) > 1),
            )
        )
    unused = sum(size for diff_id, size in sizes.items() if users[diff_id] == 0)
    return Usage(sum(sizes.values()), unused, shown)
