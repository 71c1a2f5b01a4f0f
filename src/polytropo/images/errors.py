"""What is wrong with an image or an archive, as one sentence."""

from polytropo.errors import PolytropoError

_SHOWN_MAX = 120


class ImageError(PolytropoError):
    """An image that cannot be used, made or found."""


def shown(name: bytes | str) -> str:
    """A name from an archive, short and fit for a terminal."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    text = text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 3]}..."
    return f'"{text}"' if text.isprintable() else ascii(text)
