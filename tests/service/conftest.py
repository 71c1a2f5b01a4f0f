"""What the tests of services mount, and where."""

from pathlib import Path

import pytest

from tests.conftest import Isolated


@pytest.fixture
def data(isolated: Isolated) -> Path:
    """A directory with the file `file`."""
    path = isolated.directory / "data"
    path.mkdir()
    (path / "file").write_text("content\n")
    return path


@pytest.fixture
def mnt(isolated: Isolated) -> Path:
    """A mount point."""
    path = isolated.directory / "mnt"
    path.mkdir()
    return path
