"""Names on a mount, asked for again and again with the library: what is kept is what the kernel says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.preload.conftest import Compile
from tests.preload.test_shared_reads import OnMount


def mount(isolated: Isolated, kind: str) -> Path:
    """A mount of an empty directory, or of a union with nothing in it."""
    directory, lower = isolated.directory / "names", isolated.directory / "lower"
    mountpoint = isolated.directory / "mnt"
    for made in (directory, lower, mountpoint):
        made.mkdir(mode=0o755)
    upper: dict[str, object] = {
        "kind": "dir",
        "path": str(directory),
        "coherence": "shared" if kind == "shared" else "exclusive",
    }
    root = upper
    if kind.startswith("union"):
        below = {"kind": "dir", "path": str(lower), "coherence": "immutable", "read_only": True}
        root = {"kind": "union", "lowers": [below], "upper": upper}
    document = {"version": 1, "root": root, "channel_writes": kind.endswith("writes")}
    stack = isolated.directory / "stack.json"
    stack.write_text(json.dumps(document))
    isolated.polytropo("mount", stack, mountpoint)
    return mountpoint


@pytest.mark.parametrize("kind", ["exclusive", "exclusive, writes", "union, writes", "shared"])
def test_names_are_as_the_kernel_says(
    isolated: Isolated, library: Path, compile_program: Compile, kind: str
) -> None:
    """Between changes by this process and others; with other rights, roots and directories."""
    program = compile_program("names")
    place = OnMount(isolated, mount(isolated, kind))
    # Of a shared one the kernel keeps nothing, so each question of the program's own is a request.
    done = place.run(program, "15" if kind == "shared" else "150")
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done
    report = place.trace.read_text()
    if kind.endswith("writes"):
        # Those of the first process, the others are its children.
        assert max(map(int, re.findall(r"in the process (\d+)", report))) > 10_000, report


@pytest.mark.parametrize("kind", ["exclusive", "exclusive, writes", "union, writes", "shared"])
def test_directories_are_as_the_kernel_says(
    isolated: Isolated, library: Path, compile_program: Compile, kind: str
) -> None:
    """Listed and walked through while names change, and descriptors are duplicated, inherited, made real."""
    program = compile_program("directories")
    place = OnMount(isolated, mount(isolated, kind))
    done = place.run(program, "15" if kind == "shared" else "150")
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done
    if kind.endswith("writes"):
        report = place.trace.read_text()
        assert max(map(int, re.findall(r"in the process (\d+)", report))) > 300, report


EXECUTABLE = """
import os
for name, mode in (("program", 0o755), ("text", 0o644)):
    os.close(os.open(name, os.O_CREAT, mode))
ways = (os.X_OK, os.X_OK | os.R_OK, os.R_OK)
for _ in range(200):
    found = [os.access(name, way) for name in ("program", "text", "none", ".") for way in ways]
print(found)
"""


@pytest.mark.parametrize("flags", ["exec", "noexec"])
def test_what_may_be_executed_depends_on_the_mount(isolated: Isolated, library: Path, flags: str) -> None:
    mountpoint = mount(isolated, "exclusive, writes")
    isolated.run("mount", "-o", f"remount,bind,{flags}", mountpoint)
    place = OnMount(isolated, mountpoint)
    plain = place.run(sys.executable, "-c", EXECUTABLE, preload=False)
    done = place.run(sys.executable, "-c", EXECUTABLE)
    assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr) and "True" in done.stdout
    assert ("[True, True, True, False" in done.stdout) == (flags == "exec")
    report = place.trace.read_text()
    assert place.in_process() > (2000 if flags == "exec" else 500), report


@pytest.mark.parametrize("kind", ["exclusive, writes", "union, writes"])
def test_what_is_mounted_inside_is_the_kernels(isolated: Isolated, library: Path, kind: str) -> None:
    """Names and listings where something else is mounted, by paths and by an open directory."""
    script = """
import os
for turn in range(12):
    os.mkdir(f"x{turn}")
    for again in range(3):
        assert os.listdir(f"x{turn}") == []
for turn in range(5):
    above = os.open("d", os.O_RDONLY | os.O_DIRECTORY)
    assert sorted(os.listdir("d")) == ["below", "beside"], os.listdir("d")
    own, other = os.stat("d").st_dev, os.stat("d/below").st_dev
    assert os.stat("beside", dir_fd=above).st_dev == own != other == os.stat("below", dir_fd=above).st_dev
    assert {entry.name: entry.stat().st_dev for entry in os.scandir("d")} == {"below": other, "beside": own}
    assert os.listdir("d/below") == ["theirs"], os.listdir("d/below")
    assert os.path.exists("d/below/theirs") and not os.path.exists("d/below/ours")
    assert not os.access("d/below/ours", os.F_OK)
    os.close(above)
print("as the kernel says")
"""
    prepare = "mkdir -p d/below d/beside && touch d/below/ours && mount -t tmpfs none d/below"
    words = f'{prepare} && touch d/below/theirs && exec "$0" -c "$1"'
    place = OnMount(isolated, mount(isolated, kind))
    done = place.run("sh", "-c", words, sys.executable, script)
    assert (done.returncode, done.stdout) == (0, "as the kernel says\n"), done


CHANGES = """
import os, random, stat, sys
random.seed(int(sys.argv[1]))
os.umask(random.choice([0o022, 0o027, 0o077]))
here = os.getcwd()
NAMES = ["a", "b", "c", "d", "a/a", "a/b", "b/a", "b/c/d", "a/", "nothing/here", "c/..", "."]
opened, held = {}, []
for turn in range(100):
    # The service is asked for what is asked for again.
    try:
        os.rmdir("missing")
    except FileNotFoundError:
        pass
def place(name):
    how = random.randrange(3)
    if how == 0:
        return os.path.join(here, name), None
    above, _, last = name.rpartition("/")
    if how == 2 and above and last:
        try:
            if above not in opened:
                opened[above] = os.open(above, os.O_RDONLY | os.O_DIRECTORY)
            return last, opened[above]
        except OSError:
            pass
    return name, None
def change():
    what = random.choice("mkdir mkdir rmdir unlink symlink link rename rename make make hold use use".split())
    (one, at), (two, to) = place(random.choice(NAMES)), place(random.choice(NAMES))
    if what == "mkdir":
        os.mkdir(one, 0o777, dir_fd=at)
    elif what == "rmdir":
        os.rmdir(one, dir_fd=at)
    elif what == "unlink":
        os.unlink(one, dir_fd=at)
    elif what == "symlink":
        os.symlink("a", one, dir_fd=at)
    elif what == "link":
        os.link(one, two, src_dir_fd=at, dst_dir_fd=to, follow_symlinks=False)
    elif what == "rename":
        os.rename(one, two, src_dir_fd=at, dst_dir_fd=to)
    elif what == "hold":
        # Wherever its name goes meanwhile.
        flags = random.choice([0, 0, os.O_EXCL, os.O_TRUNC])
        held.append(os.open(one, os.O_RDWR | os.O_CREAT | flags, 0o666, dir_fd=at))
    elif what == "use" and held:
        file = held.pop(random.randrange(len(held)))
        if random.randrange(2):
            held.append(os.dup(file))
        os.pwrite(file, b"y" * random.randrange(50), random.randrange(50))
        seen = os.fstat(file)
        what = [seen.st_nlink, seen.st_size, oct(seen.st_mode), os.pread(file, 200, 0)]
        os.close(file)
    else:
        file = os.open(one, os.O_WRONLY | os.O_CREAT, 0o666, dir_fd=at)
        os.write(file, b"x" * random.randrange(100))
        os.close(file)
    return what
def tree(directory, fd=None):
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        seen = os.lstat(path)
        size = 0 if stat.S_ISDIR(seen.st_mode) else seen.st_size
        links = 0 if stat.S_ISDIR(seen.st_mode) else seen.st_nlink
        print(" ", path, oct(seen.st_mode), links, size)
        if stat.S_ISDIR(seen.st_mode):
            tree(path)
for turn in range(600):
    try:
        print(turn, change())
    except OSError as error:
        print(turn, error.errno)
    if turn % 60 == 0:
        tree(".")
        while opened:
            os.close(opened.popitem()[1])
print("end")
tree(".")
"""


@pytest.mark.parametrize("kind", ["exclusive, writes", "union, writes"])
def test_names_change_as_the_kernel_changes_them(isolated: Isolated, library: Path, kind: str) -> None:
    """At random, by paths and in open directories, beside the same on a plain directory."""
    place = OnMount(isolated, mount(isolated, kind))
    script = isolated.directory / "changes.py"
    script.write_text(CHANGES)
    for seed in ("1", "2", "3"):
        own, plain = f"own-{seed}", isolated.directory / f"plain-{seed}"
        plain.mkdir()
        inside = (
            f"import os, sys; os.makedirs({own!r}); os.chdir({own!r}); exec(open({str(script)!r}).read())"
        )
        done = place.run(sys.executable, "-c", inside, seed)
        expected = subprocess.run(
            [sys.executable, str(script), seed], cwd=plain, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
        report = place.trace.read_text()
        assert max(map(int, re.findall(r"by request (\d+)", report))) > 200, report
        # Who goes through the kernel sees the same.
        paths = sorted(str(path.relative_to(plain)) for path in plain.rglob("*"))
        listed = isolated.run("find", place.mountpoint / own, "-mindepth", "1", "-printf", "%P\\n")
        assert sorted(listed.stdout.split()) == paths
