"""Layers seen as one tree, as a union shows them."""

from dataclasses import dataclass

from polytropo.images.errors import ImageError, shown
from polytropo.images.extract import OPAQUE, RESERVED, WHITEOUT
from polytropo.images.walk import Found, Tree

REDIRECT = b"user.polytropo.redirect"
_REDIRECT_BYTES_MAX = 4095


@dataclass(frozen=True)
class Part:
    """A directory of one layer; `ordinal` is 0 for the upper, and counts the lowers from 1 at the bottom."""

    tree: Tree
    path: bytes
    ordinal: int

    def child(self, name: bytes) -> "Part":
        return Part(self.tree, join(self.path, name), self.ordinal)

    def get(self, name: bytes) -> Found | None:
        return self.tree.get(join(self.path, name))

    def is_opaque(self) -> bool:
        return self.get(OPAQUE) is not None


@dataclass
class Entry:
    """A name in a merged directory: what it is, and for a directory the parts that it merges."""

    found: Found
    parts: list[Part]
    ended: bool = False
    """Whether what lies below does not join any more."""

    @property
    def part(self) -> Part:
        """Where the thing itself is."""
        return self.parts[0]


class Merged:
    """Lowers, the topmost first, and what an upper's redirects mean in them."""

    def __init__(self, lowers: list[Tree]) -> None:
        self.roots = [Part(tree, b"", len(lowers) - i) for i, tree in enumerate(lowers)]

    def parts_at(self, path: bytes) -> list[Part]:
        """The parts that the lowers merge at `path`; none if that is no directory."""
        parts = self.roots
        for name in path.split(b"/") if path else []:
            entry = self.entry(parts, name)
            parts = entry.parts if entry is not None and entry.found.is_directory else []
        return parts

    def entries(self, parts: list[Part]) -> dict[bytes, Entry]:
        """What merged parts hold, by name; whiteouts are obeyed and not shown."""
        entries: dict[bytes, Entry] = {}
        hidden: set[bytes] = set()
        for part in parts:
            hides: set[bytes] = set()
            listed = list(part.tree.list(part.path))
            for found in listed:
                if found.name.startswith(WHITEOUT):
                    hides.add(found.name.removeprefix(WHITEOUT))
                elif found.name not in hidden:
                    self._add(entries, found.name, part, found)
            hidden |= hides
        return entries

    def redirected(self, found: Found) -> list[Part] | None:
        """The lowers' parts that a directory of the upper names by its redirect, if it has one."""
        path = found.marks.get(REDIRECT)
        if path is None:
            return None
        components = [each for each in path.split(b"/") if each]
        if len(path) > _REDIRECT_BYTES_MAX or b".." in components or b"\0" in path or RESERVED in components:
            raise ImageError(f"the directory {shown(found.name)} has the impossible redirect {shown(path)}")
        return self.parts_at(b"/".join(components))

    def entry(self, parts: list[Part], name: bytes) -> Entry | None:
        """What merged parts have under one name."""
        entries: dict[bytes, Entry] = {}
        for part in parts:
            if (found := part.get(name)) is not None:
                self._add(entries, name, part, found)
            if part.get(WHITEOUT + name) is not None:
                break
        return entries.get(name)

    def _add(self, entries: dict[bytes, Entry], name: bytes, part: Part, found: Found) -> None:
        entry = entries.get(name)
        if entry is None:
            entry = entries[name] = Entry(found, [part.child(name)])
            entry.ended = not found.is_directory
        elif entry.ended or not found.is_directory:
            entry.ended = True
            return
        else:
            entry.parts.append(part.child(name))
        if entry.ended:
            return
        redirected = self.redirected(found) if part.ordinal == 0 else None
        if redirected is not None:
            entry.parts += redirected
        entry.ended = redirected is not None or part.child(name).is_opaque()


def join(path: bytes, name: bytes) -> bytes:
    """`name` in the directory `path`, both from the root."""
    return path + b"/" + name if path else name
