"""Copy-up where the host's filesystem lets files share their bytes."""

import json

import pytest

from tests.conftest import Isolated
from tests.stacks import document

SIZE_BYTES = 8 << 20


def test_copy_up_shares_what_was_not_changed(isolated: Isolated) -> None:
    disk, image, at = (isolated.directory / name for name in ("disk", "disk.image", "at"))
    for directory in (disk, at):
        directory.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    isolated.run("mkfs.xfs", "-q", "-m", "reflink=1", image)
    mounted = isolated.run("mount", "-o", "loop", image, disk, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this kernel mounts no XFS from a file: {mounted.stderr.strip()}")
    isolated.run("mkdir", disk / "low", disk / "lowest", disk / "upper")
    isolated.run("dd", "if=/dev/urandom", f"of={disk}/low/large", f"bs={SIZE_BYTES}", "count=1", "conv=fsync")
    stack = isolated.directory / "stack.json"
    (isolated.directory / "below").mkdir()
    shown = json.dumps(document("union", isolated.directory / "below"))
    stack.write_text(shown.replace(str(isolated.directory / "below"), str(disk)))
    isolated.polytropo("mount", stack, at)
    script = f"printf changed | dd of={at}/large conv=notrunc,fsync bs=7 seek=600000"
    isolated.run("sh", "-euc", script)
    parts = isolated.run("filefrag", "-v", disk / "upper" / "large").stdout
    assert "shared" in parts, parts
    differing = isolated.run("cmp", "-l", disk / "low" / "large", disk / "upper" / "large", check=False)
    assert 1 <= len(differing.stdout.splitlines()) <= len("changed"), differing
    names = isolated.run("getfattr", "-m", "-", "--absolute-names", disk / "upper" / "large").stdout
    assert "user.polytropo.blocks" not in names
    isolated.polytropo("unmount", at)
    isolated.polytropo("tenant", "stop", "default")
    isolated.run("umount", disk)
