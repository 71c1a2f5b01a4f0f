"""A tenant of its own, with limits, and what its service did for a program.

    python who_reads_what.py DIRECTORY MOUNTPOINT COMMAND...

Runs COMMAND in the mounted DIRECTORY as the tenant "observed" and prints each kind of operation.
"""

import subprocess
import sys
from pathlib import Path

from polytropo.compose import Dir, Stack
from polytropo.errors import PolytropoError
from polytropo.lifecycle import remove_tenant
from polytropo.observe import tenant_stats
from polytropo.state import State
from polytropo.tenants import create_tenant
from polytropo.units import format_ns, format_size

TENANT = "observed"


def main(directory: Path, mountpoint: Path, command: list[str]) -> int:
    state = State.open()
    create_tenant(state, TENANT, memory_bytes=512 << 20, cache_bytes=64 << 20)
    try:
        stack = Stack(Dir(directory.resolve()))
        with stack.mounted(mountpoint, tenant=TENANT, state=state) as root:
            status = subprocess.run(command, cwd=root, check=False).returncode
            stats = tenant_stats(state, TENANT)
    finally:
        remove_tenant(state, TENANT, force=True)
    for name, ran in sorted(stats.mounts[0].operations.items()):
        if ran.count:
            print(f"{name:<12} {ran.count:>6}  mean {format_ns(ran.total_ns / ran.count)}")
    print(f"read {format_size(stats.read_bytes)}, wrote {format_size(stats.written_bytes)}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
    except PolytropoError as error:
        sys.exit(f"who_reads_what: {error}")
