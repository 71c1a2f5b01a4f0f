"""Looking after a whole state directory: what takes space, what killed commands left, starting anew."""

import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from polytropo import lifecycle, mounts, service, tenants, volumes
from polytropo.cgroups import empty_groups
from polytropo.errors import PolytropoError, storage_errors
from polytropo.state import LAYOUT, State
from polytropo.trees import remove_tree

_HALF_WRITTEN_S = 600.0
"""Writing one record takes milliseconds; what is older than this has no writer any more."""


class Usage(msgspec.Struct, kw_only=True):
    """How much one kind of thing takes."""

    kind: str
    count: int
    size_bytes: int


class Pruned(msgspec.Struct, kw_only=True):
    """What `prune` cleared, by kind."""

    temporary_count: int = 0
    mount_count: int = 0
    tenant_count: int = 0
    container_count: int = 0
    layer_count: int = 0
    group_count: int = 0

    @property
    def count(self) -> int:
        return sum(msgspec.structs.astuple(self))


def usage(state: State) -> list[Usage]:
    """The disk space of a state directory, kind by kind."""
    kinds = {
        "layers": (state.layers, "*/*"),
        "images": (state.images, "*.json"),
        "containers": (state.containers, "*"),
        "volumes": (state.volumes, "*/*"),
        "tenants": (state.tenants, "*"),
        "temporary": (state.tmp, "*"),
    }
    with storage_errors("measure the state directory", state.home):
        return [
            Usage(kind=kind, count=len(list(path.glob(pattern))), size_bytes=volumes.size_bytes(path))
            for kind, (path, pattern) in kinds.items()
        ]


def prune(state: State) -> Pruned:
    """Clears what killed commands and services left behind; nothing that is used or wanted.

    Raises PolytropoError.
    """
    pruned = Pruned()
    pruned.mount_count = len(mounts.clear_dead_mounts(state.home))
    if hooks := lifecycle.container_hooks():
        pruned.container_count = hooks.prune(state)
    if images := lifecycle.image_hooks():
        pruned.layer_count = images.prune(state)
    pruned.tenant_count = _prune_tenants(state)
    pruned.group_count = _prune_groups(state)
    pruned.temporary_count = state.prune_scratch() + _prune_half_written(state)
    return pruned


def reset(state: State, told: Callable[[str], object] = str) -> None:
    """Stops all tenants and removes everything that is kept in the state directory, and itself if then empty.

    `told` hears what is being done. May be interrupted and run again. Raises PolytropoError.
    """
    for name in tenants.tenant_names(state):
        told(f"stopping the tenant {name}")
        lifecycle.remove_tenant(state, name, force=True)
    mounts.clear_dead_mounts(state.home)
    inside = [
        mount.mountpoint for mount in mounts.mount_table() if mount.mountpoint.is_relative_to(state.home)
    ]
    if still := [path for path in inside if path != state.home]:
        raise PolytropoError(
            f"{', '.join(map(str, still))} is still mounted in the state directory; unmount it and try again"
        )
    with storage_errors("remove the state directory", state.home):
        # The version goes last: without it the rest would be a stranger's directory.
        for name in (*sorted(LAYOUT), "version"):
            told(f"removing {state.home / name}")
            path = state.home / name
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)
        for path in state.home.glob(f".version.{'[0-9a-f]' * 16}"):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # other files, or somebody's mount point
            state.home.rmdir()


def _prune_tenants(state: State) -> int:
    """Removes directories of tenants whose making was cut short."""
    removed = 0
    with state.lock("tenants"), storage_errors("clear half-made tenants", state.home):
        for path in sorted(state.tenants.iterdir()):
            if not (path / "tenant.json").exists() and service.reach(state, path.name) is None:
                remove_tree(path)
                removed += 1
    return removed


def _prune_half_written(state: State) -> int:
    """Removes what was to replace a file when its writer was killed."""
    removed = 0
    with storage_errors("clear half-written files", state.home):
        for pattern in ("", "images/", "tenants/*/", "volumes/*/*/", "containers/*/"):
            for path in state.home.glob(f"{pattern}.*.{'[0-9a-f]' * 16}"):
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _HALF_WRITTEN_S:
                        path.unlink()
                        removed += 1
    return removed


def _prune_groups(state: State) -> int:
    """Removes control groups of tenants whose service is gone."""
    removed = 0
    parent = tenants.group_parent(state)
    for group in empty_groups(parent):
        name = group.path.removeprefix(f"{parent}/")
        # Held while a service starts, which makes its group first.
        with service.service_lock(state, name):
            if not group.pids() and service.reach(state, name) is None:
                with suppress(PolytropoError):  # used again just now
                    tenants.remove_group(state, name)
                    removed += 1
    return removed
