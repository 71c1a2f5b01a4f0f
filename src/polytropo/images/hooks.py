"""What other parts ask of the images."""

from polytropo.compose import Dir
from polytropo.images.store import get_image
from polytropo.images.usage import prune as prune_images
from polytropo.state import State


def layers(state: State, name: str) -> list[Dir]:
    """The image's layers for a stack, the topmost first. Raises ImageError."""
    return get_image(state, name).dirs


def prune(state: State) -> int:
    """Removes images without name and container, and layers without an image; returns how many."""
    return prune_images(state).removed
