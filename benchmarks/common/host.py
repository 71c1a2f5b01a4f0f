"""What benchmarks ask of the host: programs run to their end, and a disk that nothing else slows down."""

import os
import subprocess
from pathlib import Path

from polytropo.cgroups import Group

TIMEOUT_S = 600.0


def command(*words: str | Path, timeout_s: float = TIMEOUT_S) -> str:
    """Runs a program and returns what it printed; its failure ends the benchmark with all that it said."""
    done = subprocess.run(
        list(map(str, words)), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def in_group(group: Group, *words: str | Path) -> list[str]:
    """The words by which a program runs in a control group from its beginning."""
    files = " ".join(f"'{file}'" for file in group.procs_files())
    script = f'for file in {files}; do echo 0 >"$file" || exit 1; done; exec "$@"'
    return ["sh", "-c", script, "sh", *map(str, words)]


def ext4_in_memory(size_bytes: int) -> Path:
    """An ext4 filesystem that no other program's writes, and no disk's moods, can slow down.

    It goes with this mount namespace, and its loop device with it.
    """
    command("mount", "-t", "tmpfs", "-o", f"size={size_bytes + (64 << 20)}", "tmpfs", "/mnt")
    disk, at = Path("/mnt/disk"), Path("/mnt/ext4")
    with disk.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)
    at.mkdir()
    command("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", disk)
    command("mount", "-o", "loop", disk, at)
    return at
