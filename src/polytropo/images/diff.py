"""What a layer must hold to turn one tree into another."""

from collections.abc import Iterator
from contextlib import closing

from polytropo.images.data import FileData
from polytropo.images.extract import WHITEOUT
from polytropo.images.ownership import Attributes
from polytropo.images.tar_writer import END, hard_link, header, regular_file
from polytropo.images.walk import Found, Tree


def changes(before: Tree, after: Tree) -> Iterator[bytes]:
    """The tar archive of a layer over `before` that makes it `after`."""
    wanted = _changed_names(before, after)
    first_names: dict[int, bytes] = {}
    # A directory stands right before all that is in it: some programs set its time when they leave it.
    waiting = [(b"", after.top())]
    while waiting:
        path, directory = waiting.pop()
        yield header(path + b"/" if path else b"./", directory.attributes)
        names = set()
        for found in after.list(path):
            names.add(found.name)
            name = _join(path, found.name)
            if name not in wanted:
                continue
            if found.is_directory:
                waiting.append((name, found))
            else:
                yield from _entry(after, name, found, first_names)
        yield from _removals(before, path, names)
    yield END


def _entry(after: Tree, name: bytes, found: Found, first_names: dict[int, bytes]) -> Iterator[bytes]:
    if found.links > 1 and found.inode in first_names:
        yield hard_link(name, first_names[found.inode], found.attributes)
        return
    if found.is_file:
        with closing(FileData(after.open_file(name, found.inode))) as data:
            yield from regular_file(name, found.attributes, data)
    else:
        yield header(name, found.attributes, link=after.target_of(name) if found.is_link else b"")
    if found.links > 1:
        first_names[found.inode] = name


def _changed_names(before: Tree, after: Tree) -> set[bytes]:
    """Names that differ, with the directories above them."""
    changed: set[bytes] = set()
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        there = {found.name for found in before.list(path)} if _is_directory(before, path) else set()
        for found in after.list(path):
            there.discard(found.name)
            name = _join(path, found.name)
            if found.is_directory:
                waiting.append(name)
            if not _same(before, after, name, found):
                _add_with_parents(changed, name)
        if there and path:
            _add_with_parents(changed, path)
    return changed


def _same(before: Tree, after: Tree, name: bytes, found: Found) -> bool:
    old = before.get(name)
    if old is None or old.attributes != found.attributes:
        return False
    if found.is_file:
        return old.size_bytes == found.size_bytes and before.digest_of(name) == after.digest_of(name)
    return not found.is_link or before.target_of(name) == after.target_of(name)


def _removals(before: Tree, path: bytes, names: set[bytes]) -> Iterator[bytes]:
    if not _is_directory(before, path):
        return
    for found in before.list(path):
        if found.name not in names:
            yield header(_join(path, WHITEOUT + found.name), Attributes(0o100600, 0, 0, 0, 0, {}))


def _is_directory(tree: Tree, path: bytes) -> bool:
    found = tree.get(path) if path else tree.top()
    return found is not None and found.is_directory


def _add_with_parents(names: set[bytes], name: bytes) -> None:
    while name and name not in names:
        names.add(name)
        name = name.rpartition(b"/")[0]


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name
