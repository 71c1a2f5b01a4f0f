"""What this process may do on this host."""

import os
from pathlib import Path
from typing import Literal

_ALL_IDS = 2**32 - 1


def is_rootless() -> bool:
    """Whether this is an ordinary user, or the root of a user namespace only."""
    if os.geteuid() != 0:
        return True
    fields = Path("/proc/self/uid_map").read_text().split()
    return fields[:3] != ["0", "0", str(_ALL_IDS)]


def host_ownership() -> Literal["native", "xattr"]:
    """How this process keeps owners of files: native if it may give them to anybody."""
    return "xattr" if is_rootless() else "native"
