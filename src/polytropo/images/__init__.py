"""Images: imported, bootstrapped, committed; kept as layers that are stored once by content."""

from polytropo.images.bootstrap import bootstrap
from polytropo.images.commit import commit
from polytropo.images.config import ImageConfig
from polytropo.images.errors import ImageError
from polytropo.images.importing import import_image
from polytropo.images.save import save
from polytropo.images.store import Image, get_image, list_images, remove_image, tag_image
from polytropo.images.usage import Usage, df, prune

__all__ = [
    "Image",
    "ImageConfig",
    "ImageError",
    "Usage",
    "bootstrap",
    "commit",
    "df",
    "get_image",
    "import_image",
    "list_images",
    "prune",
    "remove_image",
    "save",
    "tag_image",
]
