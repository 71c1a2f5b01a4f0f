"""An image's configuration: the part of the OCI document that a container is made from."""

from typing import Any

import msgspec

from polytropo.images.errors import ImageError
from polytropo.images.layers import check_digest

LAYERS_MAX = 500
_CONFIG_BYTES_MAX = 4 << 20
_OUR_ARCHITECTURES = {"amd64", "x86_64"}


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """What the image says of programs that run in it; the names in JSON are OCI's (`Env`, `WorkingDir`)."""

    env: list[str] = []
    cmd: list[str] = []
    entrypoint: list[str] = []
    working_dir: str = ""
    user: str = ""
    exposed_ports: list[str] = []
    volumes: list[str] = []
    stop_signal: str = ""
    labels: dict[str, str] = {}


class _RootFs(msgspec.Struct):
    diff_ids: list[str]
    type: str = "layers"


class _RunConfig(msgspec.Struct, rename="pascal"):
    env: list[str] | None = None
    cmd: list[str] | None = None
    entrypoint: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    exposed_ports: dict[str, Any] | None = None
    volumes: dict[str, Any] | None = None
    stop_signal: str | None = None
    labels: dict[str, str] | None = None


class _Document(msgspec.Struct):
    rootfs: _RootFs
    architecture: str = ""
    os: str = ""
    created: str | None = None
    author: str | None = None
    config: _RunConfig | None = None
    history: list[dict[str, Any]] | None = None


class ParsedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration document, read and checked."""

    diff_ids: list[str]  # the lowest layer first
    architecture: str
    created: str
    run: ImageConfig


def parse_config(content: bytes) -> ParsedConfig:
    """Reads a configuration document. Raises ImageError for one that cannot be used here."""
    if len(content) > _CONFIG_BYTES_MAX:
        raise ImageError(f"its configuration has {len(content)} bytes; {_CONFIG_BYTES_MAX} are the most")
    try:
        document = msgspec.json.decode(content, type=_Document)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ImageError(f"its configuration is damaged ({error}); get a sound copy") from None
    if document.os not in ("", "linux"):
        raise ImageError(f"it is made for {document.os:.40}; only linux images run here")
    check_architecture(document.architecture)
    diff_ids = [check_digest(each, "a layer in its configuration") for each in document.rootfs.diff_ids]
    if not 1 <= len(diff_ids) <= LAYERS_MAX:
        raise ImageError(f"it has {len(diff_ids)} layers; 1 to {LAYERS_MAX} can be used")
    return ParsedConfig(
        diff_ids=diff_ids,
        architecture=document.architecture or "amd64",
        created=document.created or "",
        run=_run_config(document.config or _RunConfig()),
    )


def check_architecture(architecture: str) -> None:
    """Raises ImageError for an image whose programs this machine cannot run."""
    if architecture and architecture not in _OUR_ARCHITECTURES:
        raise ImageError(f"it is made for {architecture:.40}; this program runs images for amd64")


def _run_config(config: _RunConfig) -> ImageConfig:
    return ImageConfig(
        env=[each for each in config.env or [] if "=" in each],
        cmd=config.cmd or [],
        entrypoint=config.entrypoint or [],
        working_dir=config.working_dir or "",
        user=config.user or "",
        exposed_ports=sorted(config.exposed_ports or {}),
        volumes=sorted(config.volumes or {}),
        stop_signal=config.stop_signal or "",
        labels=config.labels or {},
    )
