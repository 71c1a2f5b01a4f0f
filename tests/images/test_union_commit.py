"""What a union shows of image and upper is what the committed image shows by itself."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from polytropo.images import import_image
from polytropo.images.commit import commit
from polytropo.images.save import save
from polytropo.state import State
from tests.conftest import Isolated
from tests.images.archives import Layout, directory, hard_link, member, symlink, tar

SCRIPT = Path(__file__).with_name("change_at_random.py")
LOWEST = tar(
    [
        directory("./", mode=0o755, mtime=1),
        *(member(f"dir/one{i}", b"x" * i, mtime=i) for i in range(5)),
        directory("dir/deep", mode=0o750, uid=3),
        *(member(f"dir/deep/file{i}", b"deep" * i, uid=i) for i in range(5)),
        member("dir/deep/deeper/bottom", b"bottom"),
        member("other/one", b"twins", mtime=61),
        hard_link("other/two", "other/one"),
        hard_link("dir/third", "other/one"),
        symlink("dir/link", "one1"),
        member("gone/one", b"x"),
    ]
)
MIDDLE = tar(
    [
        directory("./", mode=0o755, mtime=2),
        member("dir/one1", b"covered", mtime=3),
        member("dir/deep/.wh.file3"),
        member("gone/.wh..wh..opq"),
        member("gone/anew", b"y"),
        member("other/own", b"own"),
        hard_link("dir/own2", "other/own"),
    ]
)


def look(place: Isolated, at: Path, seed: int = 0, steps: int = 0) -> dict[str, Any]:
    """The tree at `at` after random changes."""
    shown: dict[str, Any] = json.loads(place.run(sys.executable, SCRIPT, at, str(seed), str(steps)).stdout)
    return shown


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", [4, 7, 16, 23, 31])
def test_a_committed_union_looks_as_before(isolated: Isolated, tmp_path: Path, seed: int) -> None:
    Layout(tmp_path / "base").image([LOWEST, MIDDLE])
    image = import_image(isolated.state, tmp_path / "base")[0]
    at, upper = tmp_path / "at", tmp_path / "upper"
    for path in (at, upper):
        path.mkdir()
        path.chmod(0o755)
    isolated.polytropo("mount", "base", at, "--upper", upper)
    look(isolated, at, seed, steps=60)
    isolated.polytropo("unmount", at)
    # Mounted anew, so that what is compared has left the kernel's caches.
    isolated.polytropo("mount", "base", at, "--upper", upper)
    wanted = look(isolated, at)
    isolated.polytropo("unmount", at)
    made = commit(isolated.state, image, upper, "native", name="changed")
    isolated.polytropo("mount", "changed", at)
    assert look(isolated, at) == wanted
    isolated.polytropo("unmount", at)
    save(isolated.state, made, tmp_path / "saved.tar")
    import_image(isolated.state, tmp_path / "saved.tar", name="again")
    isolated.polytropo("mount", "again", at)
    assert look(isolated, at) == wanted
    isolated.polytropo("unmount", at)
    isolated.polytropo("tenant", "stop", "--force", "default")
    assert State.open(isolated.home).prune_scratch() == 0


@pytest.mark.timeout(120)
def test_a_large_file_changed_in_place_is_committed_whole(isolated: Isolated, tmp_path: Path) -> None:
    content = bytearray(i * 7 % 251 for i in range(1 << 20))
    Layout(tmp_path / "base").image([tar([member("dir/large", bytes(content)), member("small", b"bytes")])])
    image = import_image(isolated.state, tmp_path / "base")[0]
    at, upper = tmp_path / "at", tmp_path / "upper"
    for path in (at, upper):
        path.mkdir()
    isolated.polytropo("mount", "base", at, "--upper", upper)
    change = (
        "import os, sys; os.chdir(sys.argv[1]); file = open('dir/large', 'r+b'); file.seek(500_000);"
        "file.write(b'changed'); file.close(); os.chmod('small', 0o600); os.rename('dir', 'moved')"
    )
    isolated.run(sys.executable, "-c", change, at)
    isolated.polytropo("unmount", at)
    assert (upper / "moved/large").stat().st_blocks * 512 <= 128 << 10, "a block was copied, not the file"
    made = commit(isolated.state, image, upper, "native", name="changed")
    content[500_000:500_007] = b"changed"
    assert (made.layers[0] / "moved/large").read_bytes() == content
    assert (made.layers[0] / "small").read_bytes() == b"bytes"
    isolated.polytropo("tenant", "stop", "--force", "default")
