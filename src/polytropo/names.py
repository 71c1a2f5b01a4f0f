"""Which names tenants, volumes and containers may have; checked here and nowhere else."""

import re

from polytropo.errors import PolytropoError

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")


def check_name(kind: str, name: str) -> str:
    """Returns `name` if it may name a `kind` ("tenant"); raises PolytropoError otherwise.

    >>> check_name("tenant", "shop-1")
    'shop-1'
    """
    if not _NAME.fullmatch(name):
        raise PolytropoError(
            f"{shown(name)} cannot name a {kind}; use 1 to 64 letters, digits, '_', '.' or '-',"
            " the first a letter or digit"
        )
    return name


def unknown(kind: str, name: str, known: list[str], advice: str) -> PolytropoError:
    """The sentence for a `name` that does not exist: lists what does, or gives `advice`."""
    there = f"there are: {', '.join(known)}" if known else f"there is none yet; {advice}"
    return PolytropoError(f"there is no {kind} {shown(name)}; {there}")


def shown(name: str) -> str:
    """A name in quotes, fit for a terminal whatever is in it."""
    text = name if len(name) <= 80 else name[:77] + "..."
    return ascii(text) if not text.isprintable() else f'"{text}"'
