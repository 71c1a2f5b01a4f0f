"""What commands about whole tenants and the whole state directory ask of the container engine."""

from polytropo.containers import engine, records
from polytropo.containers.records import Container
from polytropo.containers.rootless import enter
from polytropo.state import State

_STOP_TIMEOUT_S = 10.0


def of_tenant(state: State, tenant_name: str) -> list[str]:
    """The names of the tenant's containers, running or not."""
    return [container.name for container in _of_tenant(state, tenant_name)]


def using_volume(state: State, tenant_name: str, volume_name: str) -> list[str]:
    """The names of the tenant's containers that mount the volume, running or not."""
    return [
        container.name
        for container in _of_tenant(state, tenant_name)
        if any(volume.volume == volume_name for volume in container.volumes)
    ]


def using_image(state: State, digest: str) -> list[str]:
    """The names of containers, running or not, that were made from the image with this digest."""
    return [container.name for container in records.all_containers(state) if container.image_digest == digest]


def stop_tenant(state: State, tenant_name: str) -> list[str]:
    """Stops the tenant's running containers, all at the same time, and returns their names."""
    containers = _of_tenant(state, tenant_name)
    if any(records.status_of(records.files_of(state, container.id)) == "running" for container in containers):
        enter(state, tenant_name)
    return engine.stop_all(state, containers, _STOP_TIMEOUT_S)


def remove_tenant(state: State, tenant_name: str) -> None:
    """Removes the tenant's containers with their writable layers."""
    for container in _of_tenant(state, tenant_name):
        engine.remove(state, container, force=True)


def prune(state: State) -> int:
    """Clears what killed commands left of containers; returns of how many. Raises PolytropoError."""
    cleared, troubles = engine.reap_all(state)
    if troubles:
        raise troubles[0]
    return cleared


def _of_tenant(state: State, tenant_name: str) -> list[Container]:
    return [container for container in records.all_containers(state) if container.tenant == tenant_name]
