"""A container's writable layer as a layer of an image: what only the union understands is spelt out.

A directory that was renamed gets all its content and hides what is below; a file that was copied up under
one of several names, or moved with a directory, gets all of them; a file of which the upper has some blocks
gets the others; the union's own records and attributes
are left out.
"""

import re
import stat
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass

from polytropo.images.errors import ImageError
from polytropo.images.extract import OPAQUE, RESERVED, WHITEOUT
from polytropo.images.merged import Entry, Merged, Part, join
from polytropo.images.ownership import Attributes
from polytropo.images.partial import check_format, open_data
from polytropo.images.tar_writer import END, hard_link, header, regular_file
from polytropo.images.walk import Found, Tree

_LINKS = RESERVED + b"/links"
_ORIGIN = re.compile(rb"([0-9]{1,4})-([0-9]{1,20})")
_COPIES_MAX = 1 << 20
_MARKER = Attributes(stat.S_IFREG | 0o600, 0, 0, 0, 0, {})


def flattened(upper: Tree, lowers: list[Tree], mounted: Collection[bytes] = ()) -> Iterator[bytes]:
    """The tar archive of the layer that `upper` makes over `lowers`, the topmost of these first.

    What was made only to mount something on it, at one of the places `mounted`, is left out.
    """
    check_format(upper)
    yield from _Flattener(upper, lowers, mounted).archive()


@dataclass
class _Node:
    """Something that is still to be written."""

    path: bytes
    found: Found
    parts: list[Part]
    is_whole: bool = False
    """Whether it is a directory that is written with all that the lowers show in it."""
    begins_whole: bool = False
    """Whether it is the topmost such one, which hides what the lowers have at its place."""

    def child(self, name: bytes, entry: Entry, *, is_whole: bool) -> "_Node":
        path = join(self.path, name)
        return _Node(path, entry.found, entry.parts, is_whole, is_whole and not self.is_whole)


class _Flattener:
    def __init__(self, upper: Tree, lowers: list[Tree], mounted: Collection[bytes]) -> None:
        self._upper = Part(upper, b"", 0)
        self._mounted = mounted
        self._lowers = lowers
        self._merged = Merged(lowers)
        # By (ordinal, inode): the name under which it is in the archive already.
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._copies = self._read_copies()
        self._missing: dict[bytes, set[bytes]] = {}
        self._missing = self._missing_names(self._copies.keys() | self._moved_inodes())

    def archive(self) -> Iterator[bytes]:
        """The whole archive."""
        for path, node in self._nodes():
            if node is None:
                yield header(path, _MARKER)
            elif node.found.is_directory:
                yield header(path + b"/" if path else b"./", node.found.attributes)
            else:
                yield from self._entry(path, node)
        yield END

    def _nodes(self) -> Iterator[tuple[bytes, _Node | None]]:
        """What to write, in order, by name; None is a whiteout or an opaque marker."""
        # A directory stands right before all that is in it: some programs set its time when they leave it.
        waiting = [_Node(b"", self._upper.tree.top(), [self._upper])]
        while waiting:
            directory = waiting.pop()
            yield directory.path, directory
            for name, child in sorted(self._children(directory).items()):
                if child is not None and child.found.is_directory:
                    waiting.append(child)
                else:
                    yield join(directory.path, name), child

    def _children(self, directory: _Node) -> dict[bytes, _Node | None]:
        """What to write into a directory."""
        children: dict[bytes, _Node | None] = {OPAQUE: None} if directory.begins_whole else {}
        if directory.is_whole:
            for name, entry in self._merged.entries(directory.parts).items():
                children[name] = directory.child(name, entry, is_whole=True)
            return children
        children = self._own_children(directory) if directory.parts[0].ordinal == 0 else {}
        for name in self._missing.get(directory.path, set()) - children.keys():
            # A name that only the lowers have of a file that is written anyway, or a directory on the way.
            below = self._merged.entry(self._merged.parts_at(directory.path), name)
            if below is not None:
                children[name] = directory.child(name, Entry(below.found, below.parts[:1]), is_whole=False)
        return children

    def _own_children(self, directory: _Node) -> dict[bytes, _Node | None]:
        """What the upper itself has in a directory."""
        part = directory.parts[0]
        listed = {found.name: found for found in part.tree.list(part.path)}
        children: dict[bytes, _Node | None] = {}
        for name, found in listed.items():
            if name == RESERVED or self._is_mount_point(directory, found):
                continue
            if name == OPAQUE:
                children[name] = None
            elif name.startswith(WHITEOUT):
                if (
                    name.removeprefix(WHITEOUT) not in listed
                ):  # what is there anew hides the old one by itself
                    children[name] = None
            else:
                redirected = self._merged.redirected(found) if found.is_directory else None
                # A directory beside its own whiteout merges with nothing; others understand only the marker.
                is_whole = redirected is not None or (found.is_directory and WHITEOUT + name in listed)
                entry = Entry(found, [part.child(name), *(redirected or [])])
                children[name] = directory.child(name, entry, is_whole=is_whole)
        return children

    def _is_mount_point(self, directory: _Node, found: Found) -> bool:
        if join(directory.path, found.name) not in self._mounted:
            return False
        if self._merged.entry(self._merged.parts_at(directory.path), found.name) is not None:
            return False
        if found.is_directory:
            part = directory.parts[0].child(found.name)
            return next(part.tree.list(part.path), None) is None
        return found.is_file and found.size_bytes == 0

    def _entry(self, name: bytes, node: _Node) -> Iterator[bytes]:
        part, found = node.parts[0], node.found
        if stat.S_ISSOCK(found.attributes.mode):
            return  # nobody listens on it in an image
        copy = self._copies.get((part.ordinal, found.inode))
        if copy is not None and part.ordinal != 0:
            part, found = self._upper.child(_LINKS).child(copy.name), copy
        key = (part.ordinal, found.inode)
        if key in self._first_names:
            yield hard_link(name, self._first_names[key], found.attributes)
            return
        if found.links > 1:
            self._first_names[key] = name
        yield from _leaf(name, part, found, self._lowers)

    def _read_copies(self) -> dict[tuple[int, int], Found]:
        """The copies in the union's work area, by ordinal and inode of what they were copied from."""
        above = self._upper.get(RESERVED)
        links = None if above is None else self._upper.get(_LINKS)
        if links is None or not links.is_directory:
            return {}
        copies = {}
        for found in self._upper.tree.list(_LINKS):
            match = _ORIGIN.fullmatch(found.name)
            if match and not found.is_directory:
                copies[int(match[1]), int(match[2])] = found
            if len(copies) > _COPIES_MAX:
                raise ImageError(f"the container changed more than {_COPIES_MAX} files of several names")
        return copies

    def _moved_inodes(self) -> set[tuple[int, int]]:
        """Files of several names in lowers that are written because a directory above one of them moved."""
        return {
            (node.parts[0].ordinal, node.found.inode)
            for _, node in self._nodes()
            if node is not None and node.found.links > 1 and node.parts[0].ordinal > 0
        }

    def _missing_names(self, inodes: set[tuple[int, int]]) -> dict[bytes, set[bytes]]:
        """By directory, the names that the lowers still show of these files, and directories on the way."""
        missing: dict[bytes, set[bytes]] = {}
        for ordinal in sorted({ordinal for ordinal, _ in inodes}):
            if not 1 <= ordinal <= len(self._lowers):
                raise ImageError(f"the container names a lower layer {ordinal}, which its image lacks")
            tree = self._lowers[len(self._lowers) - ordinal]
            waiting = [b""]
            while waiting:
                path = waiting.pop()
                for found in tree.list(path):
                    name = join(path, found.name)
                    if found.is_directory:
                        waiting.append(name)
                    elif found.links > 1 and (ordinal, found.inode) in inodes and self._shows(name, ordinal):
                        _add_with_parents(missing, name)
        return missing

    def _shows(self, name: bytes, ordinal: int) -> bool:
        """Whether the union shows the lower's file at `name`, and not something else or nothing."""
        parts = [self._upper, *self._merged.roots]
        components = name.split(b"/")
        for i, component in enumerate(components):
            entry = self._merged.entry(parts, component)
            if entry is None:
                return False
            if i + 1 == len(components):
                return entry.part.ordinal == ordinal and entry.part.path == name
            if not entry.found.is_directory:
                return False
            parts = entry.parts
        return False


def _leaf(name: bytes, part: Part, found: Found, lowers: list[Tree]) -> Iterator[bytes]:
    if found.is_file:
        with closing(open_data(part.tree, part.path, found, lowers)) as data:
            yield from regular_file(name, found.attributes, data)
    elif found.is_link:
        yield header(name, found.attributes, link=part.tree.target_of(part.path))
    else:
        yield header(name, found.attributes)


def _add_with_parents(names: dict[bytes, set[bytes]], path: bytes) -> None:
    while path:
        above, _, name = path.rpartition(b"/")
        there = names.setdefault(above, set())
        if name in there:
            return
        there.add(name)
        path = above
