"""What ends and removes whole tenants, across containers, service, control group and files."""

import importlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from polytropo import mounts, service, tenants, volumes
from polytropo.compose import Dir
from polytropo.errors import PolytropoError
from polytropo.state import State


class ContainerHooks(Protocol):
    """What `polytropo.containers.hooks` offers to commands that deal with whole tenants."""

    def of_tenant(self, state: State, tenant_name: str) -> list[str]:
        """The names of the tenant's containers, running or not."""

    def using_volume(self, state: State, tenant_name: str, volume_name: str) -> list[str]:
        """The names of the tenant's containers that mount the volume, running or not."""

    def using_image(self, state: State, digest: str) -> list[str]:
        """The names of containers, running or not, that were made from the image with this digest."""

    def stop_tenant(self, state: State, tenant_name: str) -> list[str]:
        """Stops the tenant's running containers and returns their names."""

    def remove_tenant(self, state: State, tenant_name: str) -> None:
        """Removes the tenant's containers with their writable layers."""

    def prune(self, state: State) -> int:
        """Clears what killed commands left of containers; returns how many things that were."""


class ImageHooks(Protocol):
    """What `polytropo.images.hooks` offers to stacks that name images, and to `system prune`."""

    def layers(self, state: State, name: str) -> list[Dir]:
        """The image's layers, the topmost first. Raises PolytropoError for an unknown one."""

    def prune(self, state: State) -> int:
        """Removes layers that no image names; returns how many."""


def container_hooks() -> ContainerHooks | None:
    """The hooks of the container engine."""
    return cast(ContainerHooks | None, _module("containers"))


def image_hooks() -> ImageHooks | None:
    """The hooks of the image store."""
    return cast(ImageHooks | None, _module("images"))


def _module(package: str) -> ModuleType | None:
    if not (Path(__file__).parent / package / "hooks.py").exists():
        return None
    return importlib.import_module(f"polytropo.{package}.hooks")


def image_users(state: State, digest: str) -> list[str]:
    """The names of the containers that were made from an image."""
    hooks = container_hooks()
    return hooks.using_image(state, digest) if hooks else []


def mounted_directories(state: State) -> set[str]:
    """The directories that stacks of running services stand on. Raises PolytropoError."""
    found: set[str] = set()
    for tenant in tenants.list_tenants(state):
        client = service.reach(state, tenant.name)
        if client is None:
            continue
        with client, suppress(service.ServiceGone):
            for mount in client.mounts(stacks=True):
                found.update(_directories(mount.stack))
    return found


def stop_tenant(state: State, tenant_name: str, *, force: bool = False) -> None:
    """Stops the tenant's containers, then its service. Raises PolytropoError."""
    if hooks := container_hooks():
        hooks.stop_tenant(state, tenant_name)
    service.stop(state, tenant_name, force=force)


def remove_tenant(state: State, tenant_name: str, *, force: bool = False) -> None:
    """Stops and removes a tenant; one that has containers or volumes only with `force`."""
    hooks = container_hooks()
    if not force:
        owned = hooks.of_tenant(state, tenant_name) if hooks else []
        kept = [f"the container {name}" for name in owned]
        kept += [f"the volume {volume.name}" for volume in volumes.list_volumes(state, tenant_name)]
        if kept:
            raise PolytropoError(
                f"the tenant {tenant_name} still has {', '.join(kept)};"
                " remove them first, or everything with --force"
            )
    stop_tenant(state, tenant_name, force=force)
    if hooks:
        hooks.remove_tenant(state, tenant_name)
    mounts.clear_dead_mounts(state.home)
    tenants.remove_tenant_files(state, tenant_name)


def remove_volume(state: State, tenant_name: str, name: str) -> None:
    """Removes a volume that neither a container nor a mounted stack uses. Raises PolytropoError."""
    hooks = container_hooks()
    users = hooks.using_volume(state, tenant_name, name) if hooks else []
    if users:
        raise PolytropoError(
            f"the volume {name} is used by the container {', '.join(users)}; remove that first"
        )
    if places := _mounted_at(state, tenant_name, volumes.volume_data(state, tenant_name, name)):
        raise PolytropoError(f"the volume {name} is mounted at {', '.join(places)}; unmount that first")
    volumes.remove_volume(state, tenant_name, name)


def _mounted_at(state: State, tenant_name: str, path: Path) -> list[str]:
    """Where stacks are mounted that hold the directory `path`."""
    client = service.reach(state, tenant_name)
    if client is None:
        return []
    with client:
        try:
            found = client.mounts(stacks=True)
        except service.ServiceGone:
            return []
    return [mount.mountpoint for mount in found if str(path) in _directories(mount.stack)]


def _directories(part: object) -> Iterator[str]:
    """The paths of all `dir` layers in a stack document."""
    match part:
        case {"kind": "dir", "path": str(path)}:
            yield path
        case dict():
            for below in part.values():
                yield from _directories(below)
        case list():
            for below in part:
                yield from _directories(below)
