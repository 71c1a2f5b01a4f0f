"""Images: imported, bootstrapped, committed; kept as layers that are stored once by content.

Functions that are named as their module are imported from it: `bootstrap`, `commit`, `save`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytropo.images.config import ImageConfig
    from polytropo.images.errors import ImageError
    from polytropo.images.importing import import_image
    from polytropo.images.store import (
        Image,
        damaged_images,
        get_image,
        list_images,
        remove_image,
        tag_image,
    )
    from polytropo.images.usage import Usage, df, prune

__all__ = [
    "Image",
    "ImageConfig",
    "ImageError",
    "Usage",
    "damaged_images",
    "df",
    "get_image",
    "import_image",
    "list_images",
    "prune",
    "remove_image",
    "tag_image",
]
_MODULES = {
    "ImageConfig": "config",
    "ImageError": "errors",
    "Usage": "usage",
    "df": "usage",
    "import_image": "importing",
    "prune": "usage",
}


def __getattr__(name: str) -> Any:
    """Loads a part at its first use: `polytropo run` only looks images up, and is to start fast."""
    import importlib

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'store')}"), name)
