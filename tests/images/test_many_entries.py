"""An archive of a million entries, imported by the command as people do."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import IO

import pytest

from polytropo.images import get_image
from polytropo.state import State
from polytropo.trees import remove_tree
from tests.conftest import POLYTROPO

_ENTRIES = 1_000_000
_IN_A_DIRECTORY = 1_000
_MEMORY_MAX_BYTES = 96 << 20


def write_archive(out: IO[bytes], entries: int) -> None:
    """A root filesystem of empty files in directories, every thousandth entry a directory."""
    for number in range(entries):
        info = tarfile.TarInfo(f"d{number // _IN_A_DIRECTORY}")
        if number % _IN_A_DIRECTORY:
            info.name += f"/{number}"
        else:
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        out.write(info.tobuf(tarfile.USTAR_FORMAT))
    out.write(bytes(2 * tarfile.BLOCKSIZE))


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_million_entries_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = os.environ | {"POLYTROPO_HOME": str(home)}
    command = [POLYTROPO, "image", "import", "-", "--name", "many"]
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment) as process:
            assert process.stdin is not None
            write_archive(process.stdin, _ENTRIES)
            process.stdin.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        assert usage.ru_maxrss << 10 < _MEMORY_MAX_BYTES, f"{usage.ru_maxrss} KiB at most"
        image = get_image(State.open(home), "many")
        assert image.layer_records[0].entries == _ENTRIES
        tree = image.layers[0]
        assert sum(1 for _ in os.scandir(tree)) == _ENTRIES // _IN_A_DIRECTORY
        assert sum(1 for _ in os.scandir(tree / "d999")) == _IN_A_DIRECTORY - 1
    finally:
        remove_tree(home)  # pytest would keep it
