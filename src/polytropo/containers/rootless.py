"""Containers of an ordinary user: commands go on where the user's service shows its mounts."""

import os
import sys
from pathlib import Path

from polytropo.containers import records
from polytropo.containers.records import Container
from polytropo.errors import PolytropoError
from polytropo.host import is_rootless
from polytropo.state import State

_ENTERED = "POLYTROPO_ENTERED"


def enter(state: State, tenant_name: str) -> None:
    """Starts this command again inside the namespaces of the tenant's service, where it is root.

    Returns where that is not needed: for root, and inside. Raises PolytropoError.
    """
    if not is_rootless() or os.environ.get(_ENTERED) == tenant_name:
        return
    from polytropo.service import enter_command, start_or_reach
    from polytropo.tenants import get_tenant

    start_or_reach(state, get_tenant(state, tenant_name)).close()
    again = [sys.executable, "-m", "polytropo", *sys.argv[1:]]
    words = enter_command(state, tenant_name, Path.cwd(), again)
    # Root has another state directory by default.
    environment = os.environ | {_ENTERED: tenant_name, "POLYTROPO_HOME": str(state.home)}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(words[0], words, environment)
    except OSError as error:
        raise PolytropoError(f"{words[0]} cannot be started: {error.strerror}") from error


def find_inside(state: State, name: str) -> Container:
    """The container `name`, where its tenant's mounts are seen. Raises PolytropoError."""
    container = records.find(state, name)
    enter(state, container.tenant)
    return container


def is_outside() -> bool:
    """Whether this process cannot see what the services of its user mount."""
    return is_rootless() and _ENTERED not in os.environ


def maps_group(gid: int) -> bool:
    """Whether the group exists in this process's user namespace."""
    for line in Path("/proc/self/gid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= gid < first + count:
            return True
    return False
