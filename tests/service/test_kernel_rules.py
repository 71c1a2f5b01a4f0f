"""The kernel does what the modes of inodes are built on, in every order of opens, maps and closes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polytropo import hostprobe


@pytest.mark.parametrize("length", [4, pytest.param(5, marks=pytest.mark.soak)])
def test_every_order_goes_as_the_rules_say(tmp_path: Path, length: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting and passing files through need root")
    if not hostprobe.fuse().passthrough:
        pytest.skip("this kernel cannot pass files through (Linux 6.9 can)")
    words = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        sys.executable,
        "-m",
        "tests.service.kernel_rules",
    ]
    done = subprocess.run(
        [*words, tmp_path, str(length)], capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
