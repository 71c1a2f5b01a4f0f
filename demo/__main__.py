"""`make demo`: two tenants, real programs in a container of each, and what their services did.

Works in a state directory of its own and leaves nothing behind; KEEP=1 keeps image and state.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from demo.shell import Shell, say, step
from demo.shop import run_shop
from demo.site import run_site

IMAGE = "demo"
PROGRAMS = "redis-server,sqlite3,python3"


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("demo: run it as root; it starts containers and limits their resources")
    started = time.monotonic()
    keep = os.environ.get("KEEP", "") not in ("", "0")
    home = Path(tempfile.mkdtemp(prefix="polytropo-demo-", dir="/var/tmp"))
    home.chmod(0o711)
    shell = Shell(home)
    try:
        lines = _play(shell)
    finally:
        _clean_up(shell, keep)
    step(f"Done in {time.monotonic() - started:.0f} s")
    for line in lines:
        say(line)


def _play(shell: Shell) -> list[str]:
    step("A small Debian image, made by mmdebstrap and imported layer by layer")
    shell.polytropo("image", "bootstrap", IMAGE, "--include", PROGRAMS, show=True)
    shell.polytropo("image", "list", show=True)

    step("Two tenants, each with a storage service of its own")
    shell.polytropo("tenant", "create", "shop", "--cpus", "0", "--memory", "1GiB", "--cache", "128MiB")
    shell.polytropo("tenant", "create", "site", "--memory", "1GiB", "--cache", "128MiB")
    shell.polytropo("tenant", "list", show=True)

    lines = [*run_shop(shell, IMAGE), *run_site(shell, IMAGE)]

    step("What each tenant's service did")
    shell.polytropo("stats", show=True)
    return lines


def _clean_up(shell: Shell, keep: bool) -> None:
    if keep:
        step(f"Kept: POLYTROPO_HOME={shell.home}; remove it with `polytropo system reset --force`")
        return
    step("Cleaning up")
    shell.polytropo("system", "reset", "--force")
    shutil.rmtree(shell.home, ignore_errors=True)
    if shell.home.exists():
        sys.exit(f"demo: {shell.home} could not be removed")


if __name__ == "__main__":
    main()
