"""Composition: storage stacks as typed values.

A stack is a tree of libservices. Build it, check it, write it as the versioned JSON document that the
service reads, or mount it:

>>> from polytropo.compose import Dir, Stack, Union
>>> stack = Stack(Union([Dir("/srv/base", read_only=True)], upper=Dir("/srv/mine")))
>>> stack.check()
>>> stack.to_document()["root"]["upper"]
{'kind': 'dir', 'path': '/srv/mine'}

A wrong stack is refused with one sentence that names the place:

>>> Stack(Union([Dir("/srv/base"), Dir("b")])).check()
Traceback (most recent call last):
    ...
polytropo.compose.StackError: stack document: root.lowers[1].path: "b" is not absolute; begin it with a slash

`Image` and `Volume` stand for what the state directory holds under that name; `Stack.resolve` (which
mounting does by itself) replaces them by the directories that they mean.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from polytropo.errors import PolytropoError

if TYPE_CHECKING:
    from polytropo.state import State

    HostPath = str | os.PathLike[str]
else:
    HostPath = str  # what the document holds; `Dir` turns other path objects into it

VERSION = 1
DEPTH_MAX = 16
LOWERS_MAX = 500
_U64_MAX = 2**64 - 1

Coherence = Literal["immutable", "exclusive", "shared"]
Ownership = Literal["native", "xattr"]


class StackError(PolytropoError):
    """A stack that was refused: `place` in the document and the `problem` there."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"stack document: {place}: {problem}")
        self.place = place
        self.problem = problem


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all parts of a document share."""


class Dir(_Node, frozen=True, tag_field="kind", tag="dir"):
    """A directory of the host.

    `coherence` says who else changes it: nobody ever ("immutable"), nobody while it is mounted
    ("exclusive"), or anybody at any time ("shared"). `ownership` says where owner, mode and device numbers
    are kept: in the host's inodes ("native") or in an extended attribute ("xattr", for services that may
    not chown).

    >>> Dir("/srv/data", read_only=True).path
    '/srv/data'
    """

    path: HostPath
    read_only: bool = False
    coherence: Coherence = "shared"
    ownership: Ownership = "native"

    def __post_init__(self) -> None:
        if isinstance(self.path, os.PathLike):
            msgspec.structs.force_setattr(self, "path", os.fspath(self.path))


class Image(_Node, frozen=True, tag_field="kind", tag="image"):
    """An image's layers, read-only, by the image's name; in a union's lowers it stands for all of them.

    >>> Union([Image("app"), Dir("/data")], upper=Dir("/up")).lowers[0]
    Image(name='app')
    """

    name: str


class Volume(_Node, frozen=True, tag_field="kind", tag="volume"):
    """A named volume of the tenant that mounts the stack.

    >>> Volume("orders", read_only=True)
    Volume(name='orders', read_only=True)
    """

    name: str
    read_only: bool = False


class Union(_Node, frozen=True, tag_field="kind", tag="union"):
    """Read-only `lowers`, the topmost first, under an optional writable `upper`.

    >>> Union([Dir("/a"), Dir("/b")]).upper is None
    True
    """

    lowers: Sequence[Layer]
    upper: Layer | None = None

    def __post_init__(self) -> None:
        if isinstance(self.lowers, list):
            msgspec.structs.force_setattr(self, "lowers", tuple(self.lowers))


# What rules may name: operations of the libservice trait that can fail, and errors of filesystems.
_OPERATION_NAMES = """
    * read write copy_range lookup getattr setattr readlink mknod mkdir symlink link unlink rmdir rename open
    create tmpfile flush fsync opendir readdir readdir_plus fsyncdir statfs getxattr listxattr setxattr
    removexattr fallocate seek
"""
_ERRNO_NAMES = """
    E2BIG EACCES EAGAIN EBADF EBUSY ECANCELED ECONNREFUSED EDEADLK EDQUOT EEXIST EFAULT EFBIG EINTR EINVAL EIO
    EISDIR ELOOP EMFILE EMLINK ENAMETOOLONG ENFILE ENODATA ENODEV ENOENT ENOLCK ENOMEM ENOSPC ENOSYS ENOTCONN
    ENOTDIR ENOTEMPTY ENOTSUP ENOTTY ENXIO EOPNOTSUPP EOVERFLOW EPERM EPIPE ERANGE EREMOTEIO EROFS ESPIPE
    ESTALE ETIME ETIMEDOUT ETXTBSY EUCLEAN EXDEV
"""
FAULT_OPERATIONS = tuple(_OPERATION_NAMES.split())
FAULT_ERRNOS = frozenset(_ERRNO_NAMES.split())


class FaultRule(_Node, frozen=True, kw_only=True):
    """When a fault applies and what it does.

    `operation` is a name of the libservice trait ("read", "create") or "*". The first `after` calls pass,
    then `times` calls are hit (0: all), each with `probability`. A hit waits `delay_ms`, then fails with
    `errno` ("EIO"), or lets a read or write do at most `short_bytes`; `kill` ends the service's worker, as a
    fault of its own would.

    >>> FaultRule(operation="read", after=3, errno="EIO").probability
    1.0
    """

    operation: str
    after: int = 0
    times: int = 0
    probability: float = 1.0
    errno: str | None = None
    delay_ms: int = 0
    kill: bool = False
    short_bytes: int | None = None


class Fault(_Node, frozen=True, tag_field="kind", tag="fault"):
    """Errors, delays and short results on demand, in front of `below`; `seed` sets the dice of probabilities.

    >>> Fault(Dir("/data"), rules=[FaultRule(operation="fsync", errno="ENOSPC")]).below
    Dir(path='/data', read_only=False, coherence='shared', ownership='native')
    """

    below: Layer
    rules: Sequence[FaultRule]
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rules, list):
            msgspec.structs.force_setattr(self, "rules", tuple(self.rules))


Layer = Dir | Union | Fault | Image | Volume


class _Document(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    root: Layer
    passthrough: bool | None = None
    passthrough_min_bytes: int | None = None
    write_back: bool | None = None
    channel_writes: bool | None = None


class Stack(msgspec.Struct, frozen=True):
    """A whole stack.

    With `passthrough` the kernel reads files of immutable layers itself, those of `passthrough_min_bytes`
    at least: once for all mounts that show them, and at its own speed. Every open then takes a request,
    and writes are not held back. By default it does not; containers with a read-only root ask for it.
    With `write_back` the kernel holds back what programs write where only the service changes it. Small
    writes are faster then, but the kernel asks for the attributes of each file that was closed. By default it
    does in directories (volumes) and not in unions (roots of containers).
    With `channel_writes` programs also write through shared memory what only the service changes; for others
    every open then takes a request, too, and writes are not held back. Who mounts a stack first decides.

    >>> Stack.from_json('{"version":1,"root":{"kind":"dir","path":"/srv"}}') == Stack(Dir("/srv"))
    True
    """

    root: Layer
    passthrough: bool | None = None
    passthrough_min_bytes: int | None = None
    write_back: bool | None = None
    channel_writes: bool | None = None

    def check(self) -> None:
        """Raises `StackError` for the first thing that is wrong. Images and volumes are not looked up."""
        _check_document(_convert(self._builtins()))

    def resolve(self, state: State | None = None, tenant: str | None = None) -> Stack:
        """The same stack with every `Image` and `Volume` replaced by directories of `state`.

        Raises `PolytropoError` for names that do not exist.
        """
        from polytropo.resolve import resolve

        self.check()
        return msgspec.structs.replace(self, root=resolve(self.root, state, tenant))

    @property
    def has_names(self) -> bool:
        """Whether images or volumes stand in it by name.

        >>> Stack(Image("app")).has_names
        True
        """
        return _has_names(self.root)

    def to_document(self, state: State | None = None, tenant: str | None = None) -> dict[str, Any]:
        """The stack as the service's document, checked and resolved.

        >>> Stack(Dir("/srv", read_only=True)).to_document()
        {'version': 1, 'root': {'kind': 'dir', 'path': '/srv', 'read_only': True}}
        """
        self.check()
        stack = self.resolve(state, tenant) if _has_names(self.root) else self
        return stack._builtins()

    def to_json(self, state: State | None = None, tenant: str | None = None) -> str:
        """`to_document` as JSON text."""
        return msgspec.json.encode(self.to_document(state, tenant)).decode()

    @classmethod
    def from_json(cls, text: str | bytes, *, names: bool = False) -> Stack:
        """Reads a document and checks it whole; raises `StackError`.

        With `names` it may hold images and volumes, as people write it; the service's own never does.

        >>> Stack.from_json('{"version":1,"root":{"kind":"image","name":"app"}}', names=True).root
        Image(name='app')
        """
        return cls.from_document(_parse(text), names=names)

    @classmethod
    def from_document(cls, value: Any, *, names: bool = False) -> Stack:
        """As `from_json`, for a document that was read already."""
        _check_version(value)
        document = _convert(value)
        _check_document(document)
        names_of_settings = cls.__struct_fields__[1:]
        stack = cls(document.root, *(getattr(document, name) for name in names_of_settings))
        place = None if names else _first_name(stack.root, "root")
        if place is not None:
            raise StackError(place, "names an image or volume; a document holds dir, union and fault only")
        return stack

    @contextmanager
    def mounted(
        self, path: HostPath, *, tenant: str | None = None, state: State | None = None
    ) -> Iterator[Path]:
        """Mounts the stack at the directory `path` for the length of a `with` block.

        The tenant's service is started if need be. Raises `PolytropoError`.

            with Stack(Dir("/srv/data")).mounted("/mnt") as mnt:
                (mnt / "hello").write_text("hello")
        """
        from polytropo.service import mount, unmount
        from polytropo.state import State

        state = state or State.open()
        mountpoint = Path(os.path.realpath(path))
        mount(state, tenant, self, mountpoint)
        try:
            yield mountpoint
        finally:
            unmount(state, mountpoint)

    def _builtins(self) -> dict[str, Any]:
        try:
            root = msgspec.to_builtins(self.root)
        except (TypeError, RecursionError) as error:
            raise StackError("root", f"is not made of layers: {error}") from error
        settings = {name: getattr(self, name) for name in self.__struct_fields__[1:]}
        given = {name: value for name, value in settings.items() if value is not None}
        return {"version": VERSION, "root": root, **given}


def _convert(value: Any) -> _Document:
    """The typed values for plain ones; checks what the types say."""
    try:
        return msgspec.convert(value, _Document)
    except msgspec.ValidationError as error:
        match = re.fullmatch(r"(.*?)(?: - at `\$\.?(.*)`)?", str(error), re.DOTALL)
        assert match is not None
        problem = match[1][:1].lower() + match[1][1:]
        raise StackError(match[2] or "document", problem) from error
    except RecursionError as error:
        raise StackError("root", f"is nested deeper than {DEPTH_MAX} layers") from error


def _parse(text: str | bytes) -> Any:
    """The plain value of JSON text, as strict as the service: UTF-8, no field twice, nothing at the end."""
    try:
        value = msgspec.json.decode(text)
        import json  # its parser alone tells of fields that are there twice

        json.loads(text, object_pairs_hook=_refuse_repetition)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise StackError("document", str(error)) from error
    except RecursionError as error:
        raise StackError("document", "is nested too deeply") from error
    return value


def _refuse_repetition(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise StackError("document", f'the field "{name}" is there twice')


def _check_version(value: Any) -> None:
    version = value.get("version") if isinstance(value, dict) else None
    if not isinstance(value, dict) or "version" not in value:
        raise StackError("version", 'is missing; write "version": 1')
    if not isinstance(version, int) or isinstance(version, bool) or not 0 <= version <= _U64_MAX:
        raise StackError("version", "is not a whole number")
    if version != VERSION:
        advice = "; use a newer polytropo" if version > VERSION else ""
        raise StackError("version", f"is {version}, but this program reads version {VERSION}{advice}")


def _check_document(document: _Document) -> None:
    _check_layer(document.root, "root", 0)
    if document.passthrough_min_bytes is not None:
        _check_u64(document.passthrough_min_bytes, "passthrough_min_bytes")


def _check_layer(layer: Layer, place: str, depth: int) -> None:
    """What the types cannot say; the same refusals, in the same order, as the service's own check."""
    if depth >= DEPTH_MAX:
        raise StackError(place, f"is nested deeper than {DEPTH_MAX} layers")
    match layer:
        case Dir(path=path):
            _check_path(os.fspath(path), f"{place}.path")
        case Union():
            _check_union(layer, place, depth)
        case Fault():
            _check_fault(layer, place, depth)
        case Image(name=name) | Volume(name=name):
            if not name:
                raise StackError(f"{place}.name", "is empty; write a name")


def _check_path(path: str, place: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise StackError(
            place, "is not valid UTF-8, which a document cannot hold; rename the directory"
        ) from error
    if not path.startswith("/"):
        raise StackError(place, f'"{path}" is not absolute; begin it with a slash')


def _check_union(union: Union, place: str, depth: int) -> None:
    if not union.lowers:
        raise StackError(f"{place}.lowers", "is empty; a union needs at least one lower layer")
    if len(union.lowers) > LOWERS_MAX:
        raise StackError(f"{place}.lowers", f"has {len(union.lowers)} layers; at most {LOWERS_MAX} work")
    for i, lower in enumerate(union.lowers):
        _check_layer(lower, f"{place}.lowers[{i}]", depth + 1)
    if union.upper is not None:
        _check_layer(union.upper, f"{place}.upper", depth + 1)


def _check_fault(fault: Fault, place: str, depth: int) -> None:
    _check_u64(fault.seed, f"{place}.seed")
    for i, rule in enumerate(fault.rules):
        _check_rule(rule, f"{place}.rules[{i}]")
    _check_layer(fault.below, f"{place}.below", depth + 1)


def _check_rule(rule: FaultRule, place: str) -> None:
    for name in ("after", "times", "delay_ms", "short_bytes"):
        value = getattr(rule, name)
        if value is not None:
            _check_u64(value, f"{place}.{name}")
    if not 0 <= rule.probability <= 1:
        raise StackError(f"{place}.probability", f"is {rule.probability:g}; it lies between 0 and 1")
    if rule.errno is None and rule.delay_ms == 0 and rule.short_bytes is None and not rule.kill:
        raise StackError(place, "does nothing; give errno, delay_ms, short_bytes or kill")
    if rule.short_bytes == 0:
        raise StackError(f"{place}.short_bytes", "is 0; at least 1 byte must pass")
    if rule.operation not in FAULT_OPERATIONS:
        known = ", ".join(FAULT_OPERATIONS[1:])
        raise StackError(
            f"{place}.operation", f'"{rule.operation}" is no operation; write "*" or one of {known}'
        )
    if rule.errno is not None and rule.errno not in FAULT_ERRNOS:
        raise StackError(
            f"{place}.errno", f'"{rule.errno}" is no error that a filesystem answers with; "EIO" is one'
        )


def _check_u64(value: int, place: str) -> None:
    if not 0 <= value <= _U64_MAX:
        raise StackError(place, f"is {value}; it lies between 0 and {_U64_MAX}")


def _first_name(layer: Layer, place: str) -> str | None:
    """The place of the first image or volume, if there is one."""
    match layer:
        case Image() | Volume():
            return place
        case Union(lowers=lowers, upper=upper):
            below = [(f"{place}.lowers[{i}]", lower) for i, lower in enumerate(lowers)]
            below += [(f"{place}.upper", upper)] if upper is not None else []
        case Fault(below=below_fault):
            below = [(f"{place}.below", below_fault)]
        case _:
            below = []
    return next((found for where, each in below if (found := _first_name(each, where))), None)


def _has_names(layer: Layer) -> bool:
    return _first_name(layer, "root") is not None
