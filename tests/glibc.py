"""The C library of a later Debian, for programs that were compiled here: most images have newer ones."""

import os
import shutil
import subprocess
from pathlib import Path

SUITE = "trixie"
TIMEOUT_S = 180


def newer_glibc() -> Path | str:
    """The directory with it and its loader, kept from run to run, or why it cannot be had."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    kept = Path(cache) / "polytropo" / f"glibc-{SUITE}"
    directory = kept / "usr" / "lib" / "x86_64-linux-gnu"
    if directory.is_dir():
        return directory
    if shutil.which("mmdebstrap") is None:
        return "mmdebstrap is not installed"
    kept.parent.mkdir(parents=True, exist_ok=True)
    half = kept.with_name(f"{kept.name}.{os.getpid()}")
    command: list[str | Path] = ["mmdebstrap", "--quiet", "--variant=extract", "--include=libc6", SUITE, half]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            return f"Debian {SUITE}'s C library cannot be had: {done.stderr.strip().splitlines()[-1:]}"
        # Another run may have been faster.
        if not kept.exists():
            half.rename(kept)
    except subprocess.TimeoutExpired:
        return f"Debian {SUITE}'s C library could not be had within {TIMEOUT_S} s"
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return directory


def flags_for(directory: Path) -> list[str]:
    """What has a linker make a program use that C library."""
    return [f"-Wl,--dynamic-linker={directory}/ld-linux-x86-64.so.2", f"-Wl,-rpath,{directory}"]
