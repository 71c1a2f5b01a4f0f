"""Whole commands: `polytropo run --rm IMAGE true` beside `podman run --rm IMAGE true`, same tree."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.common.host import command
from benchmarks.common.report import Report
from benchmarks.fuse.workloads import elapsed_ns

# Debian's podman under a hybrid control group tree, where raising limits is not permitted.
_CONFIG = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


@contextmanager
def podman(scratch: Path, root_tar: Path) -> Iterator[list[str]]:
    """The command line `podman run ... IMAGE true` on storage of its own, gone at the end."""
    config = scratch / "containers.conf"
    config.write_text(_CONFIG)
    os.environ["CONTAINERS_CONF"] = str(config)
    base = ["podman", "--root", str(scratch / "podman"), "--runroot", str(scratch / "podman-run")]
    command(*base, "import", "--quiet", root_tar, "bench:latest")
    try:
        yield [*base, "run", "--rm", "--network=host", "bench:latest", "true"]
    finally:
        command(*base, "system", "reset", "--force")


def measure(image: str, root_tar: Path, scratch: Path, report: Report, rounds: int) -> None:
    ours = [str(Path(sys.executable).parent / "polytropo"), "run", "--rm", image, "true"]
    with podman(scratch, root_tar) as theirs:
        for words in (ours, theirs):
            command(*words)
        for _ in range(rounds):
            report.add("run --rm IMAGE true, the whole command", "polytropo", elapsed_ns(*ours))
            report.add("run --rm IMAGE true, the whole command", "podman", elapsed_ns(*theirs))
