"""A file that is open for appending and mapped at once: mapped pages are written where they belong."""

import pytest

from tests.conftest import Isolated
from tests.stacks import KINDS, PASSING, WRITING_BACK, mount

_SCRIPT = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND)
os.ftruncate(fd, 9096)
with mmap.mmap(fd, 9096) as window:
    window[4096:9096] = b"m" * 5000
    window.flush()
os.write(fd, b"appended")
os.fsync(fd)
print(os.fstat(fd).st_size)
"""


@pytest.mark.parametrize("kind", [*KINDS, PASSING, WRITING_BACK])
def test_mapped_pages_are_not_appended(isolated: Isolated, kind: str) -> None:
    mounted = mount(isolated, kind)
    told = isolated.run("python3", "-c", _SCRIPT, mounted.at / "file").stdout
    assert told == "9104\n"
    mounted.unmount()
    written = (mounted.below / "upper" / "file").read_bytes()
    assert written == bytes(4096) + b"m" * 5000 + b"appended"


def test_mapped_pages_are_not_appended_where_others_write_too(isolated: Isolated) -> None:
    shared, at = isolated.directory / "shared", isolated.directory / "at"
    shared.mkdir()
    at.mkdir()
    isolated.polytropo("mount", shared, at)
    told = isolated.run("python3", "-c", _SCRIPT, at / "file").stdout
    isolated.polytropo("unmount", at)
    assert told == "9104\n"
    assert (shared / "file").read_bytes() == bytes(4096) + b"m" * 5000 + b"appended"
