"""fsspec's own abstract tests on a mount; `test_fsspec.py` runs them where that mount is."""

import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import fsspec.tests.abstract as abstract
import pytest

from polytropo.integrations.fsspec import PolytropoFileSystem


class Fixtures(abstract.AbstractFixtures):  # type: ignore[misc] # fsspec has no types
    @pytest.fixture
    def fs(self) -> Iterator[PolytropoFileSystem]:
        made = fsspec.filesystem(
            "polytropo", mountpoint=os.environ["MOUNT"], socket=os.environ["SOCKET"], auto_mkdir=True
        )
        assert isinstance(made, PolytropoFileSystem)
        yield made
        assert made.files.kernel_calls == 0, "an empty mount of one's own needs the kernel for nothing"

    @pytest.fixture
    def fs_path(self) -> str:
        return "/"

    @pytest.fixture
    def supports_empty_directories(self) -> bool:
        return True


class TestCopy(abstract.AbstractCopyTests, Fixtures):  # type: ignore[misc]
    pass


class TestGet(abstract.AbstractGetTests, Fixtures):  # type: ignore[misc]
    pass


class TestPut(abstract.AbstractPutTests, Fixtures):  # type: ignore[misc]
    pass


class TestPipe(abstract.AbstractPipeTests, Fixtures):  # type: ignore[misc]
    pass


class TestOpen(abstract.AbstractOpenTests, Fixtures):  # type: ignore[misc]
    pass


class TestOurs(Fixtures):
    """What fsspec's tests leave out, beside the same through the kernel."""

    def test_what_it_tells_is_what_the_kernel_tells(self, fs: PolytropoFileSystem) -> None:
        mount = Path(os.environ["MOUNT"])
        fs.pipe_file("/told/file", b"some bytes")
        fs.symlink("file", "/told/link")
        fs.symlink("nowhere", "/told/dangling")
        assert sorted(fs.ls("/told", detail=False)) == ["/told/dangling", "/told/file", "/told/link"]
        told = fs.info("polytropo://told/link")
        assert told["islink"] and told["destination"] == "file" and told["size"] == 10
        assert fs.lexists("/told/dangling") and not fs.exists("/told/dangling")
        assert told["mtime"] == pytest.approx((mount / "told/file").stat().st_mtime)
        assert fs.cat_file("/told/file", start=5) == b"bytes"
        fs.mv("/told/file", "/told/renamed")
        assert (mount / "told/renamed").read_bytes() == b"some bytes"
        fs.rm("/told", recursive=True)
        assert not (mount / "told").exists()

    def test_errors_are_those_of_files(self, fs: PolytropoFileSystem) -> None:
        with pytest.raises(FileNotFoundError):
            fs.cat_file("/missing")
        with pytest.raises(FileNotFoundError):
            fs.mv("/missing", "/elsewhere")
        fs.mkdir("/directory")
        with pytest.raises(FileExistsError):
            fs.mkdir("/directory")
        with pytest.raises(IsADirectoryError):
            fs.rm("/directory")
        fs.rmdir("/directory")
