"""`polytropo mount`, `unmount` and `on`: stacks on directories of the host, and programs on them."""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from polytropo.cli.options import MOUNTPOINT, PATH, STACK, is_path, tenant_option

if TYPE_CHECKING:
    from polytropo.compose import Stack
    from polytropo.state import State

_NOT_FOUND_STATUS = 127
_NOT_RUNNABLE_STATUS = 126
_DOCUMENT_MAX_BYTES = 16 << 20


@click.command()
@click.argument("stack", type=STACK)
@click.argument("mountpoint", type=PATH)
@tenant_option
@click.option("--upper", type=PATH, metavar="DIRECTORY", help="Keep changes here; STACK is not changed.")
@click.option("--read-only", is_flag=True, help="Refuse changes to a STACK that is a directory.")
def mount(stack: str, mountpoint: Path, tenant: str | None, upper: Path | None, read_only: bool) -> None:
    """Mount a stack at a directory, by the tenant's service.

    STACK is the name of an image, a path to a directory or to a stack document (JSON), or - for a document
    on standard input. A path begins with / or with a dot, or ends with .json; all else names an image.

    \b
    Example:
      polytropo mount debian /mnt --upper ./changes
      polytropo mount ./data /mnt --read-only
      polytropo mount --tenant shop stack.json /srv/shop
    """
    from polytropo.host import is_rootless
    from polytropo.service import mount as mount_stack
    from polytropo.state import State

    composed = _composed(stack, upper, read_only)
    mounted_at = mount_stack(State.open(), tenant, composed, mountpoint)
    if is_rootless() and sys.stderr.isatty():
        click.echo(f"seen by programs that `polytropo on {mounted_at} -- PROGRAM` starts", err=True)


@click.command()
@click.argument("mountpoints", type=MOUNTPOINT, nargs=-1, required=True)
@click.option("-l", "--lazy", is_flag=True, help="Also while it is in use: gone from here, ended later.")
def unmount(mountpoints: tuple[Path, ...], lazy: bool) -> None:
    """Unmount what was mounted at directories, also when its service has died.

    \b
    Example:
      polytropo unmount /mnt
    """
    from polytropo.service import unmount as unmount_stack
    from polytropo.state import State

    state = State.open()
    for mountpoint in mountpoints:
        unmount_stack(state, mountpoint, lazy=lazy)


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("-w", "--workdir", type=PATH, metavar="DIRECTORY", help="Start here instead of at MOUNTPOINT.")
@click.option(
    "--preload/--no-preload",
    default=None,
    help="Let it reach files through shared memory soon, or never; by default once that pays.",
)
@click.argument("mountpoint", type=MOUNTPOINT)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def on(workdir: Path | None, preload: bool | None, mountpoint: Path, command: tuple[str, ...]) -> NoReturn:
    """Run a program of the host on a mounted stack; its status is returned.

    MOUNTPOINT, or a directory below it, is the program's working directory. What an ordinary user mounted
    is seen by programs started in this way only.

    The program and what it starts reach files through shared memory where they can, once they have read
    or asked so much again that it pays; with --preload soon, with --no-preload never. Left alone are static,
    Go and setuid programs, debuggers and tracers (the README lists them with reasons). Without either
    option the variable POLYTROPO_PRELOAD decides: off, on, or auto, which is the default.

    \b
    Example:
      polytropo on /mnt -- git status
      polytropo on /mnt/src -- make
    """
    from polytropo.host import is_rootless
    from polytropo.preload_mode import VARIABLE, mode_of
    from polytropo.service import enter_command, find_mount_above
    from polytropo.state import State

    state = State.open()
    start = Path(os.path.realpath(mountpoint))
    tenant = find_mount_above(state, start)
    words = list(command[1:] if command[0] == "--" else command)
    if not words:
        raise click.MissingParameter(param_hint="'COMMAND...'", param_type="argument")
    directory = start if workdir is None else workdir.absolute()
    mode = mode_of(preload)
    if mode != "off":
        _preload(state, tenant, start, words[0])
        os.environ[VARIABLE] = mode
    if is_rootless():
        words = enter_command(state, tenant, directory, words)
    else:
        _change_directory(directory)
    _become(words)


def _preload(state: "State", tenant: str, start: Path, program: str) -> None:
    """Sets what the program needs to use the preload library. Why it does without is told to who debugs."""
    from polytropo.errors import PolytropoError
    from polytropo.preload import environment_on

    try:
        os.environ.update(environment_on(state, tenant, start, program))
    except (PolytropoError, OSError) as reason:
        if "POLYTROPO_DEBUG" in os.environ:
            click.echo(f"polytropo: {reason}", err=True)


def _composed(text: str, upper: Path | None, read_only: bool) -> "Stack":
    """The stack that the words of a `mount` mean."""
    from msgspec import structs

    from polytropo.compose import Dir, Image, Union
    from polytropo.errors import PolytropoError
    from polytropo.host import host_ownership

    stack = _named(text)
    root = stack.root
    if read_only and isinstance(root, Dir):
        root = Dir(root.path, read_only=True)
    elif read_only and not isinstance(root, Image):
        raise PolytropoError(
            '--read-only is for directories; write "read_only": true into the stack document'
        )
    if upper is not None:
        if not upper.is_dir():
            raise PolytropoError(f"the upper directory {upper} does not exist; make it with mkdir")
        # Over a plain directory the owners are the user's own; an image has others, which have to be kept.
        ownership = "native" if isinstance(root, Dir) else host_ownership()
        root = Union([root], Dir(os.path.realpath(upper), coherence="exclusive", ownership=ownership))
    stack = structs.replace(stack, root=root)
    stack.check()
    return stack


def _named(text: str) -> "Stack":
    """What STACK names: a directory, a document, or an image."""
    from polytropo.compose import Dir, Image, Stack
    from polytropo.errors import PolytropoError

    path = Path(text)
    if text == "-":
        return Stack.from_json(sys.stdin.buffer.read(_DOCUMENT_MAX_BYTES), names=True)
    if not is_path(text):
        if not text:
            raise PolytropoError("the stack's name is empty; name an image, a directory or a document")
        return Stack(Image(text))
    if path.is_dir():
        return Stack(Dir(os.path.realpath(path)))
    try:
        document = path.read_bytes()
    except OSError as error:
        raise PolytropoError(f"the stack {path} cannot be read: {error.strerror}") from error
    return Stack.from_json(document, names=True)


def _change_directory(directory: Path) -> None:
    from polytropo.errors import PolytropoError

    try:
        os.chdir(directory)
    except OSError as error:
        raise PolytropoError(f"the directory {directory} cannot be entered: {error.strerror}") from error


def _become(words: list[str]) -> NoReturn:
    """This process becomes the program; shells' statuses if it cannot."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        found = not isinstance(error, FileNotFoundError)
        click.echo(f"polytropo: {words[0]} cannot be started: {error.strerror}", err=True)
        raise click.exceptions.Exit(_NOT_RUNNABLE_STATUS if found else _NOT_FOUND_STATUS) from error
