"""The fsspec filesystem, by fsspec's own abstract tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Isolated
from tests.service.keepers import Keeper

SUITE = Path(__file__).with_name("suite_fsspec.py")


@pytest.fixture
def keeper(isolated: Isolated) -> Iterator[Keeper]:
    started = Keeper(isolated, arguments=["--channel-writes"])
    yield started
    started.close()


def test_fsspecs_own_tests_pass(keeper: Keeper) -> None:
    source, mount = keeper.place.directory / "files", keeper.place.directory / "mnt"
    source.mkdir()
    keeper.mount(source, mount, coherence="exclusive")
    keeper.place.environment |= {
        "MOUNT": str(mount),
        "SOCKET": str(keeper.run_dir / "channel" / "channel.sock"),
        "PYTHONPATH": str(SUITE.parents[2]),
    }
    # In the mount's namespace, with no configuration of this run's.
    words = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", SUITE.parent)
    done = keeper.place.run(sys.executable, "-m", "pytest", *words, SUITE, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]
