"""Programs do with the preload library what they do without it, and it stays out where it must."""

import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preload.conftest import NEWER_GLIBC, Compile, Preloaded


def test_the_library_stands_alone(library: Path) -> None:
    """No symbol in, none out, no other library, no thread-local storage, no stack that can be executed."""

    def readelf(option: str) -> str:
        return subprocess.run(
            ["readelf", "-W", option, library], capture_output=True, text=True, timeout=10, check=True
        ).stdout

    symbols = [line for line in readelf("--dyn-syms").splitlines() if re.match(r"\s*[1-9]\d*:", line)]
    assert symbols == []
    dynamic = readelf("--dynamic")
    assert "NEEDED" not in dynamic and "TEXTREL" not in dynamic
    assert "INITFIRST" in dynamic and "INIT_ARRAY" in dynamic
    headers = readelf("--program-headers")
    assert " TLS " not in headers
    assert re.search(r"GNU_STACK.* RW ", headers)
    assert {fields[2] for fields in map(str.split, readelf("--relocs").splitlines()) if len(fields) == 4} == {
        "R_X86_64_RELATIVE"
    }


def test_the_library_touches_no_vector_register(library: Path) -> None:
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert "syscall" in listing
    assert not re.search(r"%([xyz]?mm\d|st\b)", listing)


@pytest.mark.parametrize(
    "command",
    [
        ("ls", "-lR", "--time-style=full-iso", "/etc"),
        (
            "bash",
            "-c",
            "for i in 1 2 3; do echo $i | cat; done; (echo a; ls -d /etc) > /dev/null; wait; exit 3",
        ),
        ("sh", "-c", "set -e; x=$(cat /etc/passwd | wc -l); test $x -gt 1; echo ok"),
        ("grep", "-r", "root", "/etc/passwd", "/etc/group"),
        ("find", "/usr/share/doc", "-maxdepth", "1", "-name", "b*"),
        ("tar", "-cf", "-", "-C", "/etc", "passwd", "group"),
        ("perl", "-e", "print join(',', map { $_ * 2 } 1 .. 5), qq(\\n); exit 4"),
        ("git", "--version"),
        ("cat", "/nowhere"),
        ("awk", 'BEGIN { while ((getline line < "/etc/passwd") > 0) n++; print n }'),
    ],
    ids=lambda command: command[0],
)
def test_real_programs(preloaded: Preloaded, command: tuple[str, ...]) -> None:
    preloaded.same(*command)


def test_python(preloaded: Preloaded) -> None:
    script = """
import concurrent.futures, multiprocessing, os, subprocess, tempfile, threading
with tempfile.TemporaryDirectory() as directory:
    for index in range(50):
        with open(os.path.join(directory, str(index)), "w") as file:
            file.write("x" * index)
    print(sum(os.stat(entry).st_size for entry in os.scandir(directory)))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = [os.path.join(directory, name) for name in os.listdir(directory)]
        print(sum(pool.map(lambda name: len(open(name).read()), names)))
print(subprocess.run(["echo", "child"], capture_output=True).stdout)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
"""
    preloaded.same(sys.executable, "-c", script)


def test_git(preloaded: Preloaded, tmp_path: Path) -> None:
    script = """
git init -q -b main repository && cd repository && for i in 1 2 3 4 5; do echo $i > $i; done
git add . && GIT_AUTHOR_DATE=@0 GIT_COMMITTER_DATE=@0 git -c user.name=a -c user.email=a@b commit -qm first
echo more >> 3; rm 4; git status --porcelain; git diff | cat; git log --format=%H; git fsck
"""
    for way in ("plain", "preloaded"):
        (tmp_path / way).mkdir()
    plain = preloaded.plain("sh", "-c", script, cwd=tmp_path / "plain")
    done = preloaded.run("sh", "-c", script, cwd=tmp_path / "preloaded")
    assert plain.returncode == 0 and (done.returncode, done.stdout, done.stderr) == (
        0,
        plain.stdout,
        plain.stderr,
    )


@pytest.mark.parametrize("name", ["threads", "children"])
@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc", NEWER_GLIBC])
def test_c_programs(preloaded: Preloaded, compile_program: Compile, name: str, compiler: str) -> None:
    done = preloaded.same(compile_program(name, compiler=compiler))
    assert done.returncode == 0, done
    if name == "threads":
        assert done.stdout == b"cancelled 4, cleaned 4\nhandled some\n"


def test_a_static_program_is_left_alone(preloaded: Preloaded, compile_program: Compile) -> None:
    done = preloaded.run(compile_program("children", "-static"))
    assert done.returncode == 0, done
    # Its children, which are dynamic, are not.
    assert preloaded.report()


def test_a_privileged_program_is_left_alone(
    preloaded: Preloaded, compile_program: Compile, tmp_path: Path
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a program of another user that runs with root's rights")
    program = Path(shutil.copy(compile_program("threads"), tmp_path / "privileged"))
    library = Path(shutil.copy(preloaded.library, tmp_path / "library.so"))
    for path in tmp_path.parents:
        if path.stat().st_uid == 0 and path != Path("/") and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    program.chmod(0o4755)
    # The loader takes a library into such programs by a bare name only, from a directory of its own, if
    # it has the bit, too.
    library.chmod(0o4755)
    trusted = Path("/usr/lib/x86_64-linux-gnu/libmemusage.so")
    script = f"""
mount --make-rprivate / && mount --bind {library} {trusted} || exit 77
export LD_PRELOAD={trusted.name}
setpriv --reuid=65534 --regid=65534 --clear-groups {program} && cat /proc/self/maps
"""
    environment = {name: value for name, value in preloaded.environment().items() if name != "LD_PRELOAD"}
    done = preloaded.run("unshare", "--mount", "sh", "-c", script, environment=environment)
    assert done.returncode == 0, done
    assert trusted.name.encode() in done.stdout
    # cat reports; the privileged program says nothing, not even that it steps aside.
    assert len(preloaded.report()) == 1, preloaded.report()


def test_a_sanitized_program_is_left_alone(preloaded: Preloaded, compile_program: Compile) -> None:
    program = compile_program("children", "-fsanitize=address", "-static-libasan")
    environment = preloaded.environment(ASAN_OPTIONS="detect_leaks=0")
    done = preloaded.run(program, environment=environment)
    assert done.returncode == 0, done
    assert any("stepped aside: a sanitizer" in line for line in preloaded.report())


def test_what_makes_its_own_calls_is_left_alone(preloaded: Preloaded, tmp_path: Path) -> None:
    """liburing asks for rings without the C library; an empty library has its name, which tells."""
    (tmp_path / "own.c").write_text("int ring;\n")
    (tmp_path / "main.c").write_text("extern int ring; int main(void) { return ring; }\n")
    library, program = tmp_path / "liburing.so.2", tmp_path / "program"
    build: list[str | Path] = [
        "gcc",
        "-shared",
        "-fPIC",
        "-Wl,-soname,liburing.so.2",
        "-o",
        library,
        tmp_path / "own.c",
    ]
    subprocess.run(build, check=True, timeout=60)
    subprocess.run(["gcc", "-o", program, tmp_path / "main.c", library], check=True, timeout=60)
    done = preloaded.run(program, environment=preloaded.environment(LD_LIBRARY_PATH=str(tmp_path)))
    assert done.returncode == 0, done
    assert any("stepped aside: a library makes system calls itself" in line for line in preloaded.report())


def test_it_can_be_turned_off(preloaded: Preloaded) -> None:
    done = preloaded.run("/bin/true", environment=preloaded.environment(POLYTROPO_PRELOAD="off"))
    assert done.returncode == 0
    (line,) = preloaded.report()
    assert line.endswith("stepped aside: POLYTROPO_PRELOAD=off")


def test_twice_does_no_harm(preloaded: Preloaded, tmp_path: Path) -> None:
    again = shutil.copy(preloaded.library, tmp_path / "again.so")
    done = preloaded.run(
        "cat", "/etc/passwd", environment=preloaded.environment(LD_PRELOAD=f"{preloaded.library} {again}")
    )
    assert done.returncode == 0 and done.stdout == Path("/etc/passwd").read_bytes()
    assert any("rewritten already" in line for line in preloaded.report())


def test_memory_that_must_not_be_both_written_and_executed(
    preloaded: Preloaded, compile_program: Compile
) -> None:
    """Programs inherit such a policy (PR_SET_MDWE); the library gives up before it changed anything."""
    done = preloaded.run_under_mdwe("/bin/cat", "/etc/passwd")
    assert done.returncode == 0 and done.stdout == Path("/etc/passwd").read_bytes(), done
    (line,) = preloaded.report()
    assert "stepped aside: the C library's code cannot be written" in line


def test_known_sites_are_those_found(preloaded: Preloaded, with_sites: Preloaded, tmp_path: Path) -> None:
    reports = []
    # With prepared code, with known sites alone, with nothing.
    for prepared in (True, False, None):
        way = preloaded if prepared is None else with_sites
        if prepared is False:
            for file in tmp_path.glob("*.code"):
                file.unlink()
        way.same("cat", "/etc/passwd")
        (line,) = way.report()
        reports.append(line[line.index("sites") : line.index("; start")])
    assert len(set(reports)) == 1


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "shifted", "noise"])
def test_wrong_files_of_sites_are_not_believed(with_sites: Preloaded, tmp_path: Path, damage: str) -> None:
    (file,) = tmp_path.glob("*.sites")
    (prepared,) = tmp_path.glob("*.code")
    prepared.unlink()
    good = file.read_bytes()
    header, sites = good[:76], good[76:]
    shifted = (
        struct.pack("<4I", *(a + 1, b + 1, c + 1, d)) for a, b, c, d in struct.iter_unpack("<4I", sites)
    )
    damaged = {
        "empty": b"",
        "cut": good[:-1],
        "other": good[:16] + bytes(20) + good[36:],
        "shifted": header + b"".join(shifted),
        "noise": header + random.Random(1).randbytes(len(sites)),
    }
    file.write_bytes(damaged[damage])
    with_sites.same("sh", "-c", "cat /etc/passwd | wc -l; exit 3")
