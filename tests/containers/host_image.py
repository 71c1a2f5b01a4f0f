"""A root filesystem made of programs of this machine, with the C libraries that they need."""

import io
import re
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

PROGRAMS = [
    "bash",
    "cat",
    "chroot",
    "cksum",
    "cmp",
    "cp",
    "dd",
    "env",
    "find",
    "grep",
    "head",
    "id",
    "ls",
    "mkdir",
    "mv",
    "perl",
    "python3",
    "rm",
    "sed",
    "sh",
    "sha256sum",
    "sleep",
    "sort",
    "stat",
    "tail",
    "test",
    "timeout",
    "true",
    "wc",
    "xargs",
]
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


def make(path: Path, programs: Iterable[str] = PROGRAMS, more: Mapping[str, Path] | None = None) -> Path:
    """Writes the tar; `more` maps names in it to files of this machine, which may be programs, too."""
    files: dict[str, Path] = {}
    for program in programs:
        found = _on_path(program)
        files[f"bin/{program}"] = found
        files |= {str(library).lstrip("/"): library for library in _libraries(found)}
    for name, source in (more or {}).items():
        files[name.lstrip("/")] = source
        files |= {str(library).lstrip("/"): library for library in _libraries(source)}
    with tarfile.open(path, "w", dereference=True) as archive:
        for directory in ("dev", "etc", "proc", "run", "sys", "tmp", "usr", "var", "home/app", "root"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if directory == "tmp" else 0o755
            archive.addfile(entry)
        for name, content in {
            "etc/passwd": "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
            "etc/group": "root:x:0:\napp:x:1000:\n",
        }.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content.encode()))
        for name, source in sorted(files.items()):
            archive.add(source.resolve(), name, recursive=source.is_dir(), filter=_without_caches)
    return path


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if entry.name.endswith("__pycache__") or "/test/" in entry.name else entry


def _on_path(program: str) -> Path:
    for directory in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        if (path := Path(directory) / program).exists():
            return path
    raise FileNotFoundError(program)


def _libraries(program: Path) -> list[Path]:
    if program.is_dir():
        return []
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, timeout=20, check=False)
    return [Path(found) for found in _LIBRARY.findall(listed.stdout)]
