"""Volumes: directories that outlive containers, a set of them for each tenant."""

import os
import time
from contextlib import suppress
from pathlib import Path

from polytropo.errors import PolytropoError, storage_errors
from polytropo.names import check_name, unknown
from polytropo.state import Record, State, read_record, write_record
from polytropo.trees import remove_tree


class VolumeExists(PolytropoError):
    """The tenant has a volume of that name already."""


class Volume(Record, kw_only=True):
    """One volume, kept as volume.json."""

    name: str
    tenant: str
    created_unix_s: float


def volume_data(state: State, tenant_name: str, name: str) -> Path:
    """Where the bytes of a volume lie."""
    return _directory(state, tenant_name, name) / "data"


def create_volume(state: State, tenant_name: str, name: str) -> Volume:
    """Makes an empty volume of an existing tenant. Raises PolytropoError."""
    check_name("volume", name)
    volume = Volume(name=name, tenant=tenant_name, created_unix_s=time.time())
    final = _directory(state, tenant_name, name)
    with state.lock("volumes"), storage_errors(f"create the volume {name}", state.home):
        if final.exists():
            raise VolumeExists(
                f"the tenant {tenant_name} has a volume {name} already; `volume list` shows it"
            )
        final.parent.mkdir(mode=0o700, exist_ok=True)
        with state.scratch("volume") as scratch:
            made = scratch.path / "volume"
            made.mkdir(mode=0o700)
            (made / "data").mkdir(mode=0o755)
            (made / "data").chmod(0o755)  # whatever the umask says
            write_record(made / "volume.json", volume)
            made.rename(final)
    return volume


def get_volume(state: State, tenant_name: str, name: str) -> Volume:
    """The volume `name` of a tenant; raises PolytropoError, which lists what exists."""
    check_name("volume", name)
    try:
        return read_record(_directory(state, tenant_name, name) / "volume.json", Volume)
    except FileNotFoundError:
        known = [volume.name for volume in list_volumes(state, tenant_name)]
        advice = f"make it with `polytropo volume create --tenant {tenant_name} {name}`"
        raise unknown(f"volume of the tenant {tenant_name} named", name, known, advice) from None


def list_volumes(state: State, tenant_name: str | None = None) -> list[Volume]:
    """A tenant's volumes (None: everybody's), sorted."""
    found = []
    with storage_errors("list the volumes", state.home):
        for path in sorted(state.volumes.glob(f"{tenant_name or '*'}/*/volume.json")):
            with suppress(FileNotFoundError):
                found.append(read_record(path, Volume))
    return found


def remove_volume(state: State, tenant_name: str, name: str) -> None:
    """Removes a volume and its data; the caller makes sure that nobody uses it."""
    get_volume(state, tenant_name, name)
    with (
        state.lock("volumes"),
        storage_errors(f"remove the volume {name}", state.home),
        state.scratch("volume") as scratch,
    ):
        # Gone at once for everybody else, and cleared later if this process is killed now.
        _directory(state, tenant_name, name).rename(scratch.path / "volume")
        remove_tree(scratch.path / "volume")


def size_bytes(path: Path) -> int:
    """Disk space that the files below `path` take; each inode counts once."""
    total, seen, waiting = 0, set(), [path]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # removed meanwhile, or not ours to read
            continue
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
    return total


def _directory(state: State, tenant_name: str, name: str) -> Path:
    return state.volumes / tenant_name / name
