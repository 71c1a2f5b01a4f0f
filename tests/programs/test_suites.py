"""Suites of others, run with their files on a mount: CPython's, fio, dbench, stress-ng."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.programs.conftest import Desk, desk_named

# Debian's interpreter and the suite that Debian ships with it (libpython3.11-testsuite).
PYTHON = "/usr/bin/python3.11"
# In the long form each runs for so many seconds.
STRESSOR_S = int(os.environ.get("POLYTROPO_STRESSOR_S", "20"))
STRESSORS = ("dentry", "fallocate", "fcntl", "filename", "iomix", "link", "locka", "rename", "seek", "xattr")
MODULES = ("test_os", "test_shutil", "test_posix", "test_mmap", "test_tempfile", "test_fcntl", "test_zipfile")

# Each with its reason; all else that fails only on a mount fails this test.
_TO_USER_2_31 = "root gives files to the user 2**31; SEMANTICS.md says why not"
KNOWN = {
    f"{name} (test.test_posix.PosixTester.{name})": _TO_USER_2_31
    for name in ("test_chown", "test_fchown", "test_lchown")
}


# Linux keeps it for the next syncfs when it takes back what a killed program changed; SEMANTICS.md says when.
_KERNELS_OWN = re.compile(r"io: syncfs failed, errno=4 ")


def test_cpython_finds_the_filesystem_in_order(desk: Desk) -> None:
    done = desk.run(
        PYTHON, "-m", "test", "-W", "--tempdir", desk.directory, *MODULES, check=False, timeout_s=280
    )
    mounted = _failures(done.stdout + done.stderr)
    if done.returncode == 0:
        return
    # What fails on the host's own filesystem for the same user says nothing of the mount.
    plain = desk.place.directory / "plain"
    plain.mkdir()
    plain.chmod(0o777)
    again = desk.place.run(
        *(word.replace(str(desk.directory), str(plain)) for word in desk.words()),
        *(PYTHON, "-m", "test", "-W", "--tempdir", plain, *MODULES),
        check=False,
        timeout_s=280,
    )
    only_here = mounted - _failures(again.stdout + again.stderr) - KNOWN.keys()
    assert mounted and not only_here, f"{sorted(only_here)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"


def _failures(output: str) -> set[str]:
    return set(re.findall(r"^(?:FAIL|ERROR): (.*)$", output, re.MULTILINE))


def test_fio_reads_back_what_it_wrote(other_desk: Desk) -> None:
    common = "--size=24M --bs=4k-64k --verify=crc32c --do_verify=1 --verify_fatal=1 --output-format=terse"
    jobs = (
        "--name=buffered --rw=randwrite --ioengine=psync --fsync=64",
        "--name=direct --rw=randwrite --ioengine=libaio --iodepth=8 --direct=1 --bs=4k",
        "--name=mapped --rw=randwrite --ioengine=mmap",
        "--name=mixed --rw=randrw --ioengine=psync --numjobs=2 --group_reporting",
    )
    for job in jobs:
        other_desk.sh(f"fio {job} {common} --directory=.", timeout_s=200)


def test_dbench_runs(desk: Desk) -> None:
    loads = Path("/usr/share/dbench/client.txt")
    out = desk.sh(f"dbench -t 5 -c {loads} -D . 4 2>&1", timeout_s=100)
    assert "Throughput" in out


def test_stress_ng_runs(other_desk: Desk) -> None:
    together = " ".join(f"--{name} 1" for name in STRESSORS)
    _stress(other_desk, f"{together} --timeout 8s")


ORDINARY = ("dir-ordinary", "writing-back-union-ordinary", "private-dir-ordinary")
ROOT = ("union-root", "private-union-root", "private-writing-back-union-root")


@pytest.fixture(params=[*ORDINARY, *ROOT])
def any_desk(request: pytest.FixtureRequest, isolated: Isolated) -> Iterator[Desk]:
    yield from desk_named(isolated, str(request.param))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_all_of_stress_ng_runs(any_desk: Desk) -> None:
    # binderfs is another filesystem of the kernel's; where there is none, stress-ng's status is not 0.
    seconds = f"--sequential 1 --timeout {STRESSOR_S}s"
    _stress(any_desk, f"--class filesystem --exclude binderfs {seconds}", timeout_s=3500)


def _stress(desk: Desk, which: str, timeout_s: float = 280) -> None:
    words = f"stress-ng {which} --verify --temp-path . 2>&1"
    done = desk.run("bash", "-euc", words, check=False, timeout_s=timeout_s)
    # Some stressors tell of a failure and end as if there were none.
    failures = [
        line for line in done.stdout.splitlines() if " fail: " in line and not _KERNELS_OWN.search(line)
    ]
    if done.returncode != 0 or failures:
        # Only the service knows what was wrong with bytes that the kernel wrote back later.
        logs = "".join(path.read_text() for path in desk.place.home.glob("tenants/*/run/service.log"))
        pytest.fail(f"stress-ng ended with status {done.returncode}\n{done.stdout}\n{logs}")
