"""Files that preloaded programs open without FUSE: as the kernel's, and what others change is seen."""

import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.preload.conftest import NEWER_GLIBC, Compile
from tests.preload.test_names import mount
from tests.preload.test_shared_reads import OnMount

# One that ordinary users may run.
PYTHON = "/usr/bin/python3.11"
KINDS = ["exclusive, writes", "union, writes", "shared"]


def filled(isolated: Isolated, kind: str) -> OnMount:
    place = OnMount(isolated, mount(isolated, kind))
    for name, size in (("small", 4096), ("large", 300_000)):
        # Nobody has looked at it yet through the mount.
        (isolated.directory / "names" / name).write_bytes(
            bytes(range(1, 251)) * (size // 250) + b"x" * (size % 250)
        )
    return place


# Every kind, and every C library.
LIBRARIES = [*(("gcc", kind) for kind in KINDS), ("musl-gcc", KINDS[0]), (NEWER_GLIBC, KINDS[0])]


@pytest.mark.parametrize(("compiler", "kind"), LIBRARIES)
@pytest.mark.parametrize("name", ["small", "large"])
def test_descriptors_behave_as_the_kernels(
    isolated: Isolated, library: Path, compile_program: Compile, kind: str, name: str, compiler: str
) -> None:
    """What the kernel has to do it does; limits, numbers, offsets are right; with other rights, too."""
    program = compile_program("placeholders", compiler=compiler)
    place = filled(isolated, kind)
    plain = place.run(program, name, "rights", preload=False)
    done = place.run(program, name, "rights")
    assert done.stdout.splitlines() == plain.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, plain.stderr) and "wrong 0" in done.stdout


# Another process changes things by commands of its shell, without the library, while files are open here.
CHANGES = """
import os, subprocess, sys
environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
other = subprocess.Popen(["sh"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
def do(command):
    other.stdin.write(command.encode() + b"\\necho done\\n")
    other.stdin.flush()
    assert other.stdout.readline() == b"done\\n"
def look(name):
    try:
        file = os.open(name, os.O_RDONLY)
    except OSError as error:
        return error.errno
    if os.path.isdir(name):
        os.close(file)
        return "directory"
    status = os.fstat(file)
    found = os.read(file, 20), os.pread(file, 20, 5), status.st_size, status.st_nlink, status.st_mode
    os.close(file)
    return found
def tell(*words):
    print(*words, flush=True)
do("printf 0123456789abcdef > file; mkdir d e; printf below > d/file; ln -s d l; printf e > e/file")
for _ in range(50):
    look("file"), look("l/file"), look("none")
tell(look("file"), look("l/file"), look("none"))
file = os.open("file", os.O_RDONLY)
for command in (
    "printf ABC | dd of=file conv=notrunc 2>&-",
    "printf more >> file",
    "truncate -s 5 file",
    "truncate -s 9 file",
    "chmod 600 file",
    "ln file twice",
    "printf other > new; mv new file",
    "rm twice",
    "printf again > file",
    "rm file",
    "mkdir file",
    "rmdir file; printf last > file",
    "rm l; ln -s e l",
    "mv e f",
    "rm l; mv f l",
    "chmod 0 l",
    "chmod 755 l",
):
    do(command)
    status = os.fstat(file)
    tell(command, look("file"), look("l/file"), look("none"))
    tell(os.pread(file, 20, 0), os.read(file, 3), os.lseek(file, 0, os.SEEK_CUR))
    tell(status.st_size, status.st_nlink)
    tell(os.lseek(os.open("file", os.O_RDONLY), -1, os.SEEK_END) if os.path.isfile("file") else None)
for number in range(200):
    do(f"printf {number} > file")
    tell(look("file")[0])
for number in range(300):
    if look("file")[0] != b"199":
        tell("wrong")
gone = os.open("file", os.O_RDONLY)
os.unlink("file")
tell(os.read(gone, 1), os.fstat(gone).st_nlink, os.readlink(f"/proc/self/fd/{gone}").rsplit("/")[-1])
child = os.fork()
if child == 0:
    tell(os.read(gone, 10))
    os._exit(0)
tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.read(gone, 10))
tell(look("file"))
do("rm -rf l d file")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_changes_by_others_are_seen(isolated: Isolated, library: Path, kind: str) -> None:
    place = OnMount(isolated, mount(isolated, kind))
    python = Path(sys.executable).resolve()
    plain = place.run(python, "-c", CHANGES, preload=False)
    assert plain.returncode == 0, plain.stderr
    done = place.run(python, "-c", CHANGES)
    assert done.stdout.splitlines() == plain.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, plain.stderr)


def test_what_the_kernel_is_spared(isolated: Isolated, library: Path) -> None:
    """Known files are opened and read without the service; the kernel copies and closes a descriptor."""
    place = filled(isolated, "exclusive, writes")
    script = """
import os
for _ in range(1000):
    file = os.open("small", 0)
    os.fstat(file), os.read(file, 4096)
    os.close(file)
"""
    done = place.run(Path(sys.executable).resolve(), "-c", script)
    assert done.returncode == 0, done.stderr
    report = place.trace.read_text()
    assert place.in_process() > 1900, report
    assert max(map(int, re.findall(r"by request (\d+)", report))) < 100, report


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc", NEWER_GLIBC])
def test_threads_are_cancelled_at_any_moment(
    isolated: Isolated, library: Path, compile_program: Compile, compiler: str
) -> None:
    """No thread waits for good because the signal came while it was in the library."""
    program = compile_program("cancelled", compiler=compiler)
    place = OnMount(isolated, mount(isolated, "exclusive, writes"))
    done = place.run(program, "500")
    assert (done.returncode, done.stdout, done.stderr) == (0, "500 500 50, cleaned 1050 of 1050\n", "")
    assert place.in_process() > 500


LISTED = """
import os, time
os.mkdir("listed")
for _ in range(20):
    os.listdir("listed")
directory = os.open("listed", os.O_RDONLY | os.O_DIRECTORY)
os.listdir(directory)
def look():
    found = os.fstat(directory)
    return found.st_mode, found.st_uid, found.st_ino == os.stat("listed").st_ino, found.st_mtime_ns
first = look()
for _ in range(1000):
    assert look() == first
print(oct(first[0]), first[1:3])
os.chmod("listed", 0o711)
print(oct(look()[0]))
time.sleep(0.02)
os.close(os.open("listed/new", os.O_CREAT | os.O_WRONLY))
print(look()[3] > first[3])
os.remove("listed/new")
os.rmdir("listed")
print(os.fstat(directory).st_nlink)
"""


def test_open_directories_are_told_of_in_the_process(isolated: Isolated, library: Path) -> None:
    """fstat(2) of a directory that was listed asks nobody until it changes."""
    place = filled(isolated, "exclusive, writes")
    python = Path(sys.executable).resolve()
    plain = place.run(python, "-c", LISTED, preload=False)
    done = place.run(python, "-c", LISTED)
    assert (done.stdout, done.stderr) == (plain.stdout, "") and done.stdout
    report = place.trace.read_text()
    # Two questions a look.
    assert place.in_process() > 1900, report


COPIED = """
import fcntl, os
for number in range(40):
    with open(f"from{number}", "wb") as file:
        file.write(bytes(9000))
for number in range(40):
    for _ in range(2):
        source = os.open(f"from{number}", os.O_RDONLY)
        target = os.open(f"to{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            fcntl.ioctl(target, 0x40049409, source)
        except OSError:
            pass
        assert os.listxattr(source) == []
        os.setxattr(target, "user.copied", b"yes")
        assert os.getxattr(target, "user.copied") == b"yes"
        while os.copy_file_range(source, target, 1 << 30): pass
        while os.sendfile(target, source, 0, 1 << 30) < 9000: pass
        assert os.fstat(target).st_size == 18000
        os.close(source), os.close(target)
"""


def test_small_copies_leave_files_unopened(isolated: Isolated, library: Path) -> None:
    place = OnMount(isolated, mount(isolated, "exclusive, writes"))
    done = place.run(Path(sys.executable).resolve(), "-c", COPIED)
    assert (done.returncode, done.stderr) == (0, "")
    # Of each copy at least five calls, beside opens and closes; attributes that are set make writes requests.
    report = place.trace.read_text()
    asked = sum(map(int, re.findall(r"by request (\d+)", report)))
    assert place.in_process() + asked > 80 * 5, report


FROM_A_DIRECTORY = """
import os
os.mkdir("many")
for number in range(40):
    with open(f"many/{number}", "w") as file:
        file.write(str(number) * 100)
directory = os.open("many", os.O_RDONLY | os.O_DIRECTORY)
os.listdir(directory)
flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
def look(number):
    file = os.open(str(number), flags, dir_fd=directory)
    size = os.fstat(file).st_size
    assert os.read(file, 1 << 16) == (str(number) * 100).encode() and os.read(file, 1) == b""
    os.close(file)
    return size
for _ in range(5):
    for number in range(40):
        look(number)
os.rename("many", "moved")
os.mkdir("many")
with open("many/7", "w") as file:
    file.write("another")
print(look(7), os.path.getsize("many/7"))
os.symlink("7", "moved/link")
ways = (("link", flags), ("link", os.O_RDONLY), ("none", flags), (".", flags), ("../many/7", flags))
for name, way in ways:
    try:
        print(os.read(os.open(name, way, dir_fd=directory), 20))
    except OSError as error:
        print(error.errno)
opened = os.open("8", flags, dir_fd=directory)
os.unlink("8", dir_fd=directory)
copy = os.dup(opened)
print(os.read(opened, 20), os.read(copy, 20), os.fstat(opened).st_nlink)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_opens_from_a_directory_take_one_request(isolated: Isolated, library: Path, kind: str) -> None:
    """Small files come with the answer to open; opened again they need nobody. Names are today's."""
    place = OnMount(isolated, mount(isolated, kind))
    python = Path(sys.executable).resolve()
    plain = place.run(python, "-c", FROM_A_DIRECTORY, preload=False)
    place.run("rm", "-r", "many", "moved", preload=False)
    done = place.run(python, "-c", FROM_A_DIRECTORY)
    assert done.stdout.splitlines() == plain.stdout.splitlines() and done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    report = place.trace.read_text()
    if kind != "shared":
        # Of 200 opens and closes 40 were the first of their file; making the files takes some more.
        assert max(map(int, re.findall(r"by request (\d+)", report))) < 200, report
        assert place.in_process() > 600, report


@pytest.mark.parametrize(("compiler", "kind"), LIBRARIES)
def test_writing_in_all_ways(
    isolated: Isolated, library: Path, compile_program: Compile, kind: str, compiler: str
) -> None:
    """Offsets, appends, cuts, sizes, modes and names: as by the kernel, and as a later look finds them."""
    program = compile_program("writing", compiler=compiler)
    place = OnMount(isolated, mount(isolated, kind))
    plain = place.run(program, preload=False)
    sums = place.run("sh", "-c", "rm together; cksum *; rm -rf *", preload=False)
    done = place.run(program)
    assert done.stdout.splitlines() == plain.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, plain.stderr)
    if kind != "shared":
        assert place.in_process() > 1000, place.trace.read_text()
    assert place.run("sh", "-c", "rm together; cksum *; rm -rf *", preload=False).stdout == sums.stdout


WATCHING = """
import ctypes, fcntl, os, signal, struct
libc = ctypes.CDLL(None)
def use(name):
    file = os.open(name, os.O_RDONLY)
    os.read(file, 20)
    os.close(file)
def known():
    for _ in range(50):
        use("small")
known()
if how == "inotify":
    watch = libc.inotify_init1(os.O_NONBLOCK)
    elsewhere = libc.inotify_add_watch(watch, b"/", 0xfff)
    known()
    libc.inotify_rm_watch(watch, elsewhere)
    while os.read(watch, 4096)[-16:-12] != struct.pack("i", elsewhere):
        pass
    assert libc.inotify_add_watch(watch, b".", 0xfff) > 0
    use("small")
    told, names = os.read(watch, 4096), []
    while told:
        _, mask, _, length = struct.unpack_from("iIII", told)
        names.append((hex(mask), told[16:16 + length].rstrip(bytes(1))))
        told = told[16 + length:]
    print(names)
else:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    directory = os.open(".", os.O_RDONLY)
    fcntl.fcntl(directory, fcntl.F_NOTIFY, fcntl.DN_ACCESS)
    use("small")
    print(signal.sigtimedwait([signal.SIGIO], 0).si_signo)
"""


@pytest.mark.parametrize("how", ["inotify", "dnotify"])
def test_who_watches_is_told(isolated: Isolated, library: Path, how: str) -> None:
    place = filled(isolated, "union, writes")
    program = f"how = {how!r}\n{WATCHING}"
    plain = place.run(sys.executable, "-c", program, preload=False)
    done = place.run(sys.executable, "-c", program)
    assert plain.stdout.strip() and (done.stdout, done.stderr) == (plain.stdout, plain.stderr)


LOST = """
import os, subprocess
def attempt(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return error.strerror
with open("own", "w") as made:
    made.write("own bytes")
for _ in range(80):
    os.close(os.open("own", os.O_RDONLY))
reads, writes = os.open("own", os.O_RDONLY), os.open("own", os.O_RDWR)
reads = os.open("own", os.O_RDONLY)
os.write(writes, b"O")
os.chmod("own", 0)
print(os.read(reads, 3), attempt(os.dup, reads), attempt(os.dup2, writes, 9))
print(attempt(os.posix_fallocate, writes, 0, 9), attempt(os.copy_file_range, reads, writes, 3))
print(os.read(reads, 3), os.write(writes, b"W"), attempt(os.fstat, reads) is not None)
os.chmod("own", 0o600)
print(os.read(os.dup(reads), 3), os.lseek(os.dup(writes), 0, os.SEEK_CUR))
print(subprocess.run(["cat"], stdin=writes, capture_output=True).stdout)
"""


def test_rights_that_were_lost_are_missed_only_where_the_kernel_has_to_open(
    isolated: Isolated, library: Path
) -> None:
    """Reading and writing go on; what takes an open file of the kernel's is EACCES while they are missing."""
    place = OnMount(isolated, mount(isolated, "exclusive, writes"))
    (isolated.directory / "names").chmod(0o777)
    variables = place.run("env").stdout
    socket = Path(re.findall("POLYTROPO_CHANNEL=(.*)", variables)[0])
    for directory in socket.parents:
        if directory.is_relative_to(isolated.directory):
            directory.chmod(directory.stat().st_mode | 0o011)
    trace = isolated.directory / "trace"
    user = ("setpriv", "--reuid=1", "--regid=1", "--clear-groups")
    done = place.run(
        "sh", "-c", f'touch {trace}; chmod 666 {trace}; exec "$@"', "sh", *user, PYTHON, "-c", LOST
    )
    denied = "Permission denied"
    assert done.stdout.splitlines() == [
        f"b'Own' {denied} {denied}",
        f"None {denied}",
        "b' by' 1 True",
        "b'tes' 2",
        "b'n bytes'",
    ], done
    assert done.returncode == 0


def test_who_gives_up_rights_can_load_the_library(isolated: Isolated, library: Path) -> None:
    place = filled(isolated, KINDS[0])
    done = place.run("setpriv", "--reuid=1", "--regid=1", "--clear-groups", "wc", "-c", "small")
    assert done.stdout == "4096 small\n" and "ld.so" not in done.stderr, done.stderr
