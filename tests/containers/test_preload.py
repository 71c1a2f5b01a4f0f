"""Containers whose programs load the preload library: what they find, what they do, when they do without."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polytropo.preload_files import BESIDE_SANITIZERS, LIBRARY
from tests.conftest import Isolated
from tests.containers import host_image
from tests.containers.conftest import leftovers
from tests.containers.test_rootless import User

READS = """
import os
file = os.open("/bin/perl", os.O_RDONLY)
whole = open("/bin/perl", "rb").read()
for turn in range(40):  # a channel has to have paid before it is made
    for at in range(0, 1 << 20, 5000):
        assert os.pread(file, 4096, at) == whole[at:at + 4096], at
print(len(whole))
"""
TRACE = ("-e", "POLYTROPO_TRACE=1")
LISTED = f"/run/.polytropo/lib/{BESIDE_SANITIZERS}/{LIBRARY}\n"
BUILDS = {
    "musl": ["musl-gcc"],
    "static": ["gcc", "-static"],
    "glibc": ["gcc"],
    "sanitized": ["gcc", "-fsanitize=address"],
}


@pytest.fixture(scope="session")
def host_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("host")
    source = directory / "hello.c"
    source.write_text('#include <unistd.h>\nint main(void) { return write(1, "hello\\n", 6) != 6; }\n')
    built = {}
    for name, command in BUILDS.items():
        program = directory / name
        subprocess.run([*command, "-o", program, source], check=True, timeout=60)
        built[f"bin/hello-{name}"] = program
    python = {"usr/lib/python3.11": Path("/usr/lib/python3.11")}
    return host_image.make(directory / "host.tar", more=built | python)


@pytest.fixture
def host(isolated: Isolated, library: Path, host_tar: Path) -> Iterator[Isolated]:
    """A machine with an image of programs of this one."""
    isolated.polytropo("image", "import", host_tar, "--name", "host")
    yield isolated


def in_process(text: str) -> int:
    """Calls answered without the kernel, of all processes that told."""
    return sum(map(int, re.findall(r"in the process (\d+)", text)))


def run(machine: Isolated, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return machine.polytropo("run", "--rm", *words, **options)


def test_programs_load_it_and_behave(host: Isolated) -> None:
    done = run(host, *TRACE, "host", "python3", "-c", READS)
    assert done.stdout == f"{Path('/usr/bin/perl').stat().st_size}\n"
    assert in_process(done.stderr) > 150, done.stderr
    # The C library's code is mapped with the jumps in it: no page of it is copied.
    assert re.search(
        r"r-xp .*/[0-9a-f]+\.code$", run(host, "host", "cat", "/proc/self/maps").stdout, re.MULTILINE
    )
    # Also those whose environment was cleaned; those that cannot load it go on as ever.
    for program in ("glibc", "static"):
        told = run(host, *TRACE, "host", "env", "-i", "POLYTROPO_TRACE=1", f"/bin/hello-{program}")
        assert told.stdout == "hello\n"
        assert (": sites " in told.stderr) == (program == "glibc"), told
    assert run(host, "host", "chroot", "/", "/bin/hello-glibc").stderr == ""
    # AddressSanitizer wants to be the first library.
    sanitized = run(host, *TRACE, "host", "/bin/hello-sanitized")
    assert sanitized.stdout == "hello\n" and sanitized.stderr.count("stepped aside: a sanitizer") == 1
    assert run(host, "-e", "POLYTROPO_PRELOAD=off", *TRACE, "host", "true").stderr.count("stepped aside") == 1
    without = host.polytropo("run", "--rm", "--no-preload", *TRACE, "host", "ls", "-A", "/run")
    assert (without.stdout, without.stderr) == ("", "")
    assert leftovers(host) == []


def test_stats_tell_what_became_of_calls(host: Isolated) -> None:
    done = run(host, *TRACE, "host", "python3", "-c", READS)
    (stats,) = host.json("stats", "--tenant", "default")
    assert stats["calls"]["in the process"] == in_process(done.stderr)
    assert stats["request_count"] > 0
    shown = host.polytropo("stats", "--calls").stdout
    assert "in the process" in shown and "by the kernel: " in shown


def test_what_is_shown_cannot_be_changed(host: Isolated) -> None:
    script = f"""
        cd /run/.polytropo/lib || exit 1
        for name in {LIBRARY} *.sites /etc/ld.so.preload; do
            (echo x >>"$name") 2>/dev/null && echo "changed $name"
            rm -f "$name" 2>/dev/null && echo "removed $name"
        done
        (echo x >new) 2>/dev/null && echo made
        (echo x >../new) 2>/dev/null && echo made
        mv ../channel.sock ../other 2>/dev/null && echo removed
        ls
    """
    shown = run(host, "host", "sh", "-c", script).stdout.split()
    assert LIBRARY in shown
    assert any(name.endswith(".sites") for name in shown)
    assert not {"changed", "removed", "made"} & set(shown)


def test_who_asks_for_it_also_writes_without_the_kernel(host: Isolated) -> None:
    writes = (
        "for at in range(20): open(f'/tmp/{at}', 'w').write('x'); assert open(f'/tmp/{at}').read() == 'x'"
    )
    written = [
        in_process(run(host, *options, *TRACE, "host", "python3", "-c", writes).stderr)
        for options in ((), ("--preload",))
    ]
    assert written[0] == 0 and written[1] > 20


@pytest.mark.parametrize("options", [("--read-only",), ("-u", "app"), ("--network", "none")], ids=" ".join)
def test_settings(host: Isolated, options: tuple[str, ...]) -> None:
    done = run(host, *options, *TRACE, "host", "python3", "-c", READS)
    assert done.stdout == f"{Path('/usr/bin/perl').stat().st_size}\n"
    assert in_process(done.stderr) > 150, done.stderr


def test_exec_and_restart(host: Isolated) -> None:
    host.polytropo("run", "-d", "--name", "c", "host", "sleep", "600")
    told = host.polytropo("exec", *TRACE, "c", "python3", "-c", READS)
    assert in_process(told.stderr) > 150, told.stderr
    host.polytropo("stop", "-t", "0", "c")
    host.polytropo("start", "c")
    listed = host.polytropo("exec", "c", "cat", "/etc/ld.so.preload").stdout
    assert listed == LISTED
    host.polytropo("commit", "c", "committed")
    host.polytropo("rm", "-f", "c")
    shown = host.polytropo(
        "run", "--rm", "--no-preload", "committed", "ls", "/run/.polytropo", "/etc/ld.so.preload", check=False
    )
    assert shown.stderr.count("No such file or directory") == 2


def test_what_the_image_itself_loads_is_kept(host: Isolated, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    (tmp_path / "other.c").write_text("int answer(void) { return 42; }\n")
    subprocess.run(["gcc", "-shared", "-o", other, tmp_path / "other.c"], check=True, timeout=60)
    (tmp_path / "list").write_text("/lib/other.so\n")
    more = {"lib/other.so": other, "etc/ld.so.preload": tmp_path / "list"}
    tar = host_image.make(tmp_path / "image.tar", ["cat", "sh"], more)
    host.polytropo("image", "import", tar, "--name", "own")
    shown = run(host, "own", "cat", "/etc/ld.so.preload", "/proc/self/maps").stdout
    assert shown.startswith(f"{LISTED}/lib/other.so\n")
    assert "/lib/other.so" in shown.split("\n", 2)[2]


def test_musl_takes_it_from_the_environment(host: Isolated, host_tar: Path, tmp_path: Path) -> None:
    made = {
        "bin/hello": host_tar.with_name("musl"),
        "lib/ld-musl-x86_64.so.1": Path("/lib/ld-musl-x86_64.so.1"),
    }
    tar = host_image.make(tmp_path / "musl.tar", [], made)
    host.polytropo("image", "import", tar, "--name", "musl")
    told = run(host, *TRACE, "musl", "/bin/hello")
    assert told.stdout == "hello\n" and ": sites " in told.stderr


def test_an_image_without_a_c_library_gets_nothing(host: Isolated, host_tar: Path, tmp_path: Path) -> None:
    tar = host_image.make(tmp_path / "static.tar", [], {"bin/hello": host_tar.with_name("static")})
    host.polytropo("image", "import", tar, "--name", "static")
    told = run(host, *TRACE, "static", "/bin/hello")
    assert (told.stdout, told.stderr) == ("hello\n", "")


def test_containers_of_an_ordinary_user(isolated: Isolated, library: Path, host_tar: Path) -> None:
    user = User(isolated)
    packed = isolated.directory / "image.tar"
    packed.write_bytes(host_tar.read_bytes())
    packed.chmod(0o644)
    user.printed("image", "import", packed, "--name", "host")
    for who in ("root", "app"):
        done = user.polytropo("run", "--rm", "-u", who, *TRACE, "host", "python3", "-c", READS)
        assert done.stdout == f"{Path('/usr/bin/perl').stat().st_size}\n", done
        assert in_process(done.stderr) > 150, done.stderr
