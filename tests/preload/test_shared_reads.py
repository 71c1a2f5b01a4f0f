"""Programs on a mount, with the library: they read through shared memory, and get what they should."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polytropo.preload import LEAVE_ALONE, why_not
from tests.conftest import Isolated
from tests.preload.conftest import NEWER_GLIBC, Compile

Mount = Callable[..., Path]


@pytest.fixture
def data(isolated: Isolated) -> Path:
    """Files of random bytes, small and large, the same in each run."""
    directory = isolated.directory / "data"
    directory.mkdir()
    generator = random.Random(7)
    for index, size in enumerate((0, 1, 4095, 4096, 20_000, 65_536, 65_537, 1 << 20, 5_000_001)):
        (directory / f"f{index}").write_bytes(generator.randbytes(size))
    (directory / "deeper").mkdir()
    (directory / "deeper" / "file").write_bytes(generator.randbytes(100_000))
    return directory


@pytest.fixture
def mount(isolated: Isolated, data: Path) -> Mount:
    def mounted(coherence: str) -> Path:
        mountpoint = isolated.directory / "mnt"
        mountpoint.mkdir()
        stack = isolated.directory / "stack.json"
        stack.write_text(f'{{"version":1,"root":{{"kind":"dir","path":"{data}","coherence":"{coherence}"}}}}')
        isolated.polytropo("mount", stack, mountpoint)
        return mountpoint

    return mounted


class OnMount:
    """Runs programs on a mount by `polytropo on`, with and without the library."""

    def __init__(self, isolated: Isolated, mountpoint: Path) -> None:
        self.isolated = isolated
        self.mountpoint = mountpoint
        self.trace = isolated.directory / "trace"

    def run(
        self, *command: str | Path, preload: bool | None = True, **more: str
    ) -> "subprocess.CompletedProcess[str]":
        """With `preload` None no option says it."""
        self.trace.unlink(missing_ok=True)
        way = {True: ["--preload"], False: ["--no-preload"], None: []}[preload]
        environment = {"POLYTROPO_TRACE": "1", "POLYTROPO_TRACE_FILE": str(self.trace), **more}
        return self.isolated.polytropo(
            "on", *way, self.mountpoint, "--", *command, check=False, environment=environment
        )

    def in_process(self) -> int:
        """Calls that were answered without the kernel, of all processes."""
        lines = self.trace.read_text() if self.trace.exists() else ""
        return sum(map(int, re.findall(r"in the process (\d+)", lines)))


@pytest.fixture
def on_mount(isolated: Isolated, library: Path, mount: Mount) -> Callable[[str], OnMount]:
    return lambda coherence: OnMount(isolated, mount(coherence))


@pytest.mark.parametrize("coherence", ["immutable", "exclusive", "shared"])
def test_reading_in_all_ways(
    on_mount: Callable[[str], OnMount], data: Path, compile_program: Compile, coherence: str
) -> None:
    """Offsets shared and handed on, descriptors replaced and reused: as on the directory itself."""
    program = compile_program("reading")
    place = on_mount(coherence)
    expected = place.isolated.run(program, data / "f8", data / "f6", check=False)
    assert expected.returncode == 5 and "together" in expected.stdout, expected
    plain = place.run(program, "f8", "f6", preload=False)
    assert place.in_process() == 0
    done = place.run(program, "f8", "f6")
    assert plain.stdout == expected.stdout
    assert (done.returncode, done.stdout, done.stderr) == (5, expected.stdout, expected.stderr)
    if coherence == "immutable":
        # Those of the first process are not told: it becomes another program.
        assert place.in_process() > 30, place.trace.read_text()


@pytest.mark.parametrize("name", ["threads", "children"])
@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc", NEWER_GLIBC])
def test_threads_and_children(
    on_mount: Callable[[str], OnMount], compile_program: Compile, name: str, compiler: str
) -> None:
    """Cancelled in the middle of calls that the library makes for them, too."""
    program = compile_program(name, compiler=compiler)
    place = on_mount("immutable")
    plain = place.run(program, preload=False)
    done = place.run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, plain.stderr)
    if name == "threads":
        assert done.stdout == "cancelled 4, cleaned 4\nhandled some\n"


@pytest.mark.parametrize(
    "command",
    [
        ("sh", "-c", "find . -type f | sort | xargs sha256sum"),
        ("grep", "-rc", "a", "."),
        ("sh", "-c", "cat f8 f7 f0 | cksum; (head -c 10; head -c 10) < f8 | cksum; tail -c 100 f8 | cksum"),
        ("sh", "-c", "exec 3<f8; head -c 5 <&3 | cksum; dd bs=1000 count=20 <&3 2>&- | cksum; cksum <&3"),
        ("sh", "-c", "tar -cf - . --sort=name | cksum; cp f8 /tmp/.copy && cmp f8 /tmp/.copy; rm /tmp/.copy"),
        ("cat", "missing"),
    ],
    ids=["checksums", "grep", "cat", "inherited", "tar", "missing"],
)
def test_programs(on_mount: Callable[[str], OnMount], command: tuple[str, ...]) -> None:
    place = on_mount("immutable")
    plain = place.run(*command, preload=False)
    done = place.run(*command)
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert place.trace.exists()


def test_python_reads_at_random_in_threads(on_mount: Callable[[str], OnMount], data: Path) -> None:
    script = f"""
import os, random, threading
whole = open({str(data / "f8")!r}, "rb").read()
file = os.open("f8", os.O_RDONLY)
def check(seed):
    generator = random.Random(seed)
    for _ in range(500):
        at, count = generator.randrange(len(whole) + 1000), generator.randrange(1, 200000)
        if os.pread(file, count, at) != whole[at:at + count]:
            os._exit(3)
threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
child = os.fork()
if child == 0:
    check(9)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    place = on_mount("immutable")
    done = place.run(sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, "0\n"), done
    # Those that come while a channel is being made are the kernel's.
    assert place.in_process() > 100


def test_changes_by_others_are_seen(on_mount: Callable[[str], OnMount], data: Path) -> None:
    """A directory that others change: every read shows what is there now."""
    script = f"""
import os
file = os.open("f4", os.O_RDONLY)
for turn in range(50):
    with open({str(data / "f4")!r}, "r+b") as other:
        other.write(b"%05d" % turn)
    assert os.pread(file, 5, 0) == b"%05d" % turn, turn
os.truncate({str(data / "f4")!r}, 3)
print(os.pread(file, 10, 0))
"""
    done = on_mount("shared").run(sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, "b'000'\n"), done


def test_own_writes_are_seen(on_mount: Callable[[str], OnMount]) -> None:
    script = """
import os
reading, writing = os.open("f4", os.O_RDONLY), os.open("f4", os.O_RDWR)
for turn in range(200):
    os.pwrite(writing, b"%05d" % turn, turn * 10)
    assert os.pread(reading, 5, turn * 10) == b"%05d" % turn, turn
os.ftruncate(writing, 3)
print(os.pread(reading, 10, 0))
"""
    done = on_mount("exclusive").run(sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, "b'000'\n"), done


def test_a_service_that_goes_away(on_mount: Callable[[str], OnMount]) -> None:
    """What is not to be had from memory ends as it does without the library."""
    script = """
import os, signal, time, subprocess
file = os.open("f8", os.O_RDONLY)
for _ in range(10): os.pread(file, 100, 0)
import glob
(pid_file,) = glob.glob(os.environ["POLYTROPO_HOME"] + "/tenants/*/run/keeper.pid")
os.kill(int(open(pid_file).read().split()[0]), signal.SIGKILL)
time.sleep(1)
try:
    os.mkdir("a name that nobody asked for")
    print("there")
except OSError as error:
    print(error.strerror)
"""
    done = on_mount("immutable").run(sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, "Transport endpoint is not connected\n"), done


def test_who_is_left_alone(compile_program: Compile, tmp_path: Path) -> None:
    def why(path: Path) -> str:
        return why_not(path) or "not at all"

    assert why(Path("/bin/sh")) == "not at all"
    assert why(compile_program("children", "-static")) == "it is linked statically"
    privileged = tmp_path / "privileged"
    privileged.write_bytes(Path("/bin/true").read_bytes())
    privileged.chmod(0o4755)
    assert "rights" in why(privileged)
    foreign = bytearray(Path("/bin/true").read_bytes())
    foreign[18] = 183
    (tmp_path / "foreign").write_bytes(foreign)
    assert "architecture" in why(tmp_path / "foreign")
    (tmp_path / "cut").write_bytes(Path("/bin/true").read_bytes()[:70])
    assert "whole" in why(tmp_path / "cut")
    script = tmp_path / "script"
    script.write_text("#!/usr/bin/env sh\n")
    assert why(script) == "not at all"
    script.write_text(f"#!{privileged}\n")
    assert "rights" in why(script)
    (tmp_path / "gdb").write_bytes(b"")
    assert "debugger" in why(tmp_path / "gdb")


def test_the_readme_names_who_is_left_alone() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert all(f"| `{name}` | {reason} |\n" in readme for name, reason in LEAVE_ALONE.items())


def test_the_reason_is_told_to_who_debugs(
    on_mount: Callable[[str], OnMount], compile_program: Compile
) -> None:
    place = on_mount("immutable")
    program = compile_program("children", "-static")
    arguments: list[Any] = ["on", "--preload", place.mountpoint, "--", program]
    done = place.isolated.polytropo(*arguments, environment={"POLYTROPO_DEBUG": "1"})
    assert "without the preload library: it is linked statically" in done.stderr
    assert "LD_PRELOAD" not in os.environ
