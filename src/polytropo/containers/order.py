"""From what a person asks for to a container's record: the image's settings, overridden by theirs."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from polytropo.compose import Dir, Stack, Union
from polytropo.containers.private_path import can_load
from polytropo.containers.records import (
    SHORT_ID_LENGTH,
    Container,
    Network,
    VolumeMount,
    all_containers,
    files_of,
    new_id,
)
from polytropo.containers.runtime import RUNTIMES
from polytropo.errors import PolytropoError
from polytropo.host import host_ownership
from polytropo.names import check_name, shown
from polytropo.preload_mode import Mode
from polytropo.state import State
from polytropo.tenants import get_tenant
from polytropo.volumes import get_volume

if TYPE_CHECKING:
    from polytropo.images import Image, ImageConfig

_ENV_FILE_MAX_BYTES = 1 << 20
_STOP_SIGNAL = "SIGTERM"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What `polytropo run` was asked for; None and empty is what the image says."""

    image: str
    command: Sequence[str] = ()
    tenant: str | None = None
    name: str | None = None
    volumes: Sequence[str] = ()
    environment: Sequence[str] = ()
    env_files: Sequence[Path] = ()
    cwd: str | None = None
    user: str | None = None
    entrypoint: str | None = None
    hostname: str | None = None
    network: Network = "host"
    read_only: bool = False
    share_image: bool = False
    """Have the kernel read the image's files itself also where the root can be written to."""
    terminal: bool = False
    stdin_open: bool = False
    remove_at_end: bool = False
    runtime: str = "runc"
    preload: Mode = "off"


def make_container(state: State, order: Order, image: "Image") -> Container:
    """The record of a new container. Raises PolytropoError for whatever does not exist or fit."""
    if order.runtime not in RUNTIMES:
        raise PolytropoError(f'the runtime "{order.runtime}" is not known; take {" or ".join(RUNTIMES)}')
    tenant = get_tenant(state, order.tenant)
    settings = image.config
    container_id = new_id()
    upper = Dir(files_of(state, container_id).upper, coherence="exclusive", ownership=host_ownership())
    # The service is then asked for each open, which pays where little is opened and much is read.
    passthrough = True if order.read_only or order.share_image else None
    preload = order.preload != "off" and can_load(image.layers)
    # Reading through shared memory costs others nothing; to write, the service has to hear of each open.
    soon = preload and order.preload == "on"
    channel_writes = True if soon else None
    root = Stack(Union(image.dirs, upper=upper), passthrough, channel_writes=channel_writes).to_document()
    args = _args(order, settings)
    environment = _environment(order, settings)
    check_words(args, environment)
    return Container(
        id=container_id,
        name=_new_name(state) if order.name is None else check_name("container", order.name),
        tenant=tenant.name,
        image=order.image,
        image_digest=image.digest,
        created_unix_s=time.time(),
        args=args,
        environment=environment,
        cwd=_absolute("working directory", order.cwd or settings.working_dir or "/"),
        user=settings.user if order.user is None else order.user,
        hostname=_hostname(order, container_id),
        network=order.network,
        read_only=order.read_only,
        terminal=order.terminal,
        stdin_open=order.stdin_open,
        remove_at_end=order.remove_at_end,
        runtime=order.runtime,
        preload=preload,
        patient=preload and not soon,
        stop_signal=settings.stop_signal or _STOP_SIGNAL,
        volumes=[parse_volume(state, tenant.name, text) for text in order.volumes],
        root=root,
    )


def parse_volume(state: State, tenant_name: str, text: str) -> VolumeMount:
    """The meaning of one `-v`; volumes and paths have to exist. Raises PolytropoError.

    VOLUME:/path, /host/path:/path, each with :ro or :rw at its end.
    """
    check_words([text], {})
    parts = text.split(":")
    if len(parts) not in (2, 3) or not parts[0]:
        raise PolytropoError(
            f'the volume "{text}" is not understood; write VOLUME:/path or /host/path:/path,'
            " with :ro at its end for read-only"
        )
    options = set(parts[2].split(",")) if len(parts) == 3 else set()
    if unknown := sorted(options - {"ro", "rw"}):
        raise PolytropoError(
            f'the option "{unknown[0]}" of the volume "{text}" is not known; there are ro and rw'
        )
    source, destination = parts[0], _absolute("volume's place", parts[1])
    if destination == "/":
        raise PolytropoError(f'the volume "{text}" cannot take the place of the root; give a directory in it')
    read_only = "ro" in options
    if source.startswith(("/", "./", "../")) or source in (".", ".."):
        path = os.path.realpath(source)
        if not Path(path).exists():
            raise PolytropoError(
                f"the host has no {source}, which was to be shown at {destination}; make it first"
            )
        return VolumeMount(destination=destination, read_only=read_only, host_path=path)
    volume = get_volume(state, tenant_name, source)
    return VolumeMount(destination=destination, read_only=read_only, volume=volume.name)


def parse_environment(words: Sequence[str], host: Mapping[str, str]) -> dict[str, str]:
    """NAME=VALUE as it stands; NAME alone is the host's value, if it has one."""
    found = {}
    for word in words:
        name, given, value = word.partition("=")
        if not name or "\0" in word:
            raise PolytropoError(f'the environment variable "{word}" is not understood; write NAME=VALUE')
        if given:
            found[name] = value
        elif name in host:
            found[name] = host[name]
    return found


def check_words(args: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raises PolytropoError for what the runtime's configuration, which is JSON, cannot hold."""
    for word in (*args, *(f"{name}={value}" for name, value in environment.items())):
        try:
            if b"\0" not in word.encode():
                continue
            problem = "holds a zero byte"
        except UnicodeEncodeError:
            problem = "is not valid UTF-8"
        raise PolytropoError(f"{shown(word)} {problem}, which a container's program cannot be given")


def given_environment(words: Sequence[str], files: Sequence[Path]) -> dict[str, str]:
    """The variables of --env-file and --env; the latter win. Raises PolytropoError."""
    found: dict[str, str] = {}
    for path in files:
        found |= parse_environment(_env_file_lines(path), os.environ)
    return found | parse_environment(words, os.environ)


def _args(order: Order, settings: "ImageConfig") -> list[str]:
    entrypoint, command = settings.entrypoint, settings.cmd
    if order.entrypoint is not None:
        entrypoint, command = _given_entrypoint(order.entrypoint), []
    args = entrypoint + (list(order.command) or command)
    if not args:
        raise PolytropoError(f"the image {order.image} names no program to run; give one after its name")
    return args


def _given_entrypoint(text: str) -> list[str]:
    if text.startswith("["):
        import json

        try:
            words = json.loads(text)
        except ValueError:
            words = None
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return [str(word) for word in words]
        raise PolytropoError(f"the entrypoint {text} is no JSON list of words")
    return [text] if text else []


def _environment(order: Order, settings: "ImageConfig") -> dict[str, str]:
    found = parse_environment(settings.env, {})
    return found | given_environment(order.environment, order.env_files)


def _env_file_lines(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(_ENV_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise PolytropoError(f"the environment file {path} cannot be read: {error.strerror}") from error
    if len(content) > _ENV_FILE_MAX_BYTES:
        raise PolytropoError(f"the environment file {path} is larger than {_ENV_FILE_MAX_BYTES} bytes")
    lines = content.decode("utf-8", "surrogateescape").splitlines()
    return [line.lstrip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _absolute(what: str, path: str) -> str:
    if not path.startswith("/"):
        raise PolytropoError(
            f"the {what} {shown(path)} is not absolute in the container; begin it with a slash"
        )
    check_words([path], {})
    return os.path.normpath("/" + path.lstrip("/"))


def _hostname(order: Order, container_id: str) -> str:
    name = order.hostname
    if name is None:
        return os.uname().nodename if order.network == "host" else container_id[:SHORT_ID_LENGTH]
    if not name or len(name) > 64 or not all(c.isascii() and (c.isalnum() or c in "-.") for c in name):
        raise PolytropoError(f'"{name}" is no host name; use up to 64 letters, digits, "-" and "."')
    return name


def _new_name(state: State) -> str:
    from polytropo.containers.name_words import ADJECTIVES, NOUNS

    taken = {container.name for container in all_containers(state)}
    for _ in range(1000):
        dice = int.from_bytes(os.urandom(8))
        name = f"{ADJECTIVES[dice % len(ADJECTIVES)]}_{NOUNS[dice // len(ADJECTIVES) % len(NOUNS)]}"
        if name not in taken:
            return name
    return f"container_{os.urandom(8).hex()}"
