"""The preload library, and programs to load it into."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.glibc import flags_for, newer_glibc

# As a compiler: programs run with the C library of a later Debian.
NEWER_GLIBC = "newer-glibc"
PROGRAMS = Path(__file__).parent / "programs"
TIMEOUT_S = 60.0

Result = subprocess.CompletedProcess[bytes]
Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles one of the C programs beside this file, or another one."""
    directory = tmp_path_factory.mktemp("programs")
    directory.chmod(0o755)

    def compiled(name: str | Path, *flags: str, compiler: str = "gcc") -> Path:
        source = name if isinstance(name, Path) else PROGRAMS / f"{name}.c"
        more: list[str] = []
        if compiler == NEWER_GLIBC:
            found = newer_glibc()
            if isinstance(found, str):
                pytest.skip(found)
            more = flags_for(found)
        real = "gcc" if compiler == NEWER_GLIBC else compiler
        if shutil.which(real) is None:
            pytest.skip(f"{compiler} is not installed")
        program = directory / "-".join(
            [compiler, source.parent.name, source.stem, *(flag.strip("-") for flag in flags)]
        )
        if not program.exists():
            command: list[str | Path] = [
                real,
                "-O2",
                "-Wall",
                "-pthread",
                "-o",
                program,
                source,
                *flags,
                *more,
            ]
            subprocess.run(command, check=True, timeout=TIMEOUT_S)
        return program

    return compiled


class Preloaded:
    """Runs programs with the library, its report in a file."""

    def __init__(self, library: Path, directory: Path) -> None:
        self.library = library
        self.trace = directory / "trace"

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "LC_ALL": "C.UTF-8",
            "LD_PRELOAD": str(self.library),
            "POLYTROPO_TRACE": "1",
            "POLYTROPO_TRACE_FILE": str(self.trace),
            **more,
        }

    def run(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin: bytes = b"",
    ) -> Result:
        self.trace.unlink(missing_ok=True)
        return subprocess.run(
            command,
            env=dict(environment) if environment is not None else self.environment(),
            cwd=cwd,
            input=stdin,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def plain(self, *command: str | Path, cwd: Path | None = None, stdin: bytes = b"") -> Result:
        """The same without the library."""
        environment = {
            name: value
            for name, value in self.environment().items()
            if name not in ("LD_PRELOAD", "POLYTROPO_TRACE")
        }
        return self.run(*command, environment=environment, cwd=cwd, stdin=stdin)

    def run_under_mdwe(self, *command: str) -> "subprocess.CompletedProcess[bytes]":
        """Preloads a program that may not have memory both written and executed (PR_SET_MDWE, inherited)."""
        script = f"""
import ctypes, os
refused = ctypes.CDLL(None, use_errno=True).prctl(65, 1, 0, 0, 0)
os.environ.update(LD_PRELOAD={str(self.library)!r})
os.execv({command[0]!r}, {list(command)!r}) if refused == 0 else os._exit(77)
"""
        environment = {name: value for name, value in self.environment().items() if name != "LD_PRELOAD"}
        done = self.run(sys.executable, "-c", script, environment=environment)
        if done.returncode == 77:
            pytest.skip("this kernel has no PR_SET_MDWE (6.3)")
        return done

    def report(self) -> list[str]:
        """Its lines, one for each process that ended."""
        return self.trace.read_text().splitlines() if self.trace.exists() else []

    def same(self, *command: str | Path, cwd: Path | None = None, stdin: bytes = b"") -> Result:
        """Runs it in both ways, which must not differ, and with the library at work."""
        plain = self.plain(*command, cwd=cwd, stdin=stdin)
        assert not self.report()
        done = self.run(*command, cwd=cwd, stdin=stdin)
        assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)
        assert any(": sites " in line for line in self.report()), "the library did nothing"
        return done


@pytest.fixture
def preloaded(library: Path, tmp_path: Path) -> Preloaded:
    return Preloaded(library, tmp_path)


@pytest.fixture
def with_sites(preloaded: Preloaded, tmp_path: Path) -> Preloaded:
    """The library with the sites of this machine's C library, and its code, beside it."""
    library = shutil.copy(preloaded.library, tmp_path / "beside.so")
    (libc,) = Path("/lib/x86_64-linux-gnu").glob("libc.so.6")
    tool = preloaded.library.with_name("polytropo-sites")
    subprocess.run([tool, tmp_path, libc], check=True, timeout=30)
    return Preloaded(Path(library), tmp_path)
