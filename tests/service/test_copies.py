"""By what services copy, and what they tell of it."""

import sys
from pathlib import Path

from tests.conftest import Isolated

_READ = """
import sys
from polytropo.fs import Files
with Files(sys.argv[1], sys.argv[2]) as files, files.open("large") as large:
    for _ in range(7):
        large.seek(0)
        assert large.read(4096) == bytes(4096)
"""


def test_stats_tell_what_was_copied_and_a_search_takes_it(isolated: Isolated, tmp_path: Path) -> None:
    data, mnt = isolated.directory / "data", isolated.directory / "mnt"
    data.mkdir()
    mnt.mkdir()
    (data / "large").write_bytes(bytes(1 << 20))
    stack = isolated.directory / "stack.json"
    stack.write_text(
        f'{{"version":1,"root":{{"kind":"dir","path":"{data}","read_only":true,"coherence":"immutable"}}}}'
    )
    isolated.polytropo("mount", stack, mnt, environment={"POLYTROPO_COPY": "kernel"})
    (socket,) = isolated.home.glob("tenants/*/run/channel/channel.sock")
    isolated.run(sys.executable, "-c", _READ, mnt, socket)
    told = isolated.json("stats")
    counts = told[0]["copies"]
    assert counts["read"]["4096"] == 7
    assert counts["handed"]["65536"] >= 1
    rows = [line.split() for line in isolated.polytropo("stats", "--copies").stdout.splitlines()]
    assert ["default", "read", "4", "KiB", "7"] in rows
    # What was copied goes into a search as it is.
    weights = tmp_path / "copied.json"
    weights.write_text(isolated.polytropo("stats", "--json").stdout)
    searched = isolated.json("tune", "memcpy", "--weights", weights, "--situation", "read", "--size", "64B")
    assert [cell["keep"] for cell in searched["cells"]] == [False, True]
    isolated.polytropo("unmount", mnt)


def test_an_unknown_way_to_copy_is_refused(isolated: Isolated) -> None:
    data, mnt = isolated.directory / "data", isolated.directory / "mnt"
    data.mkdir()
    mnt.mkdir()
    stack = isolated.directory / "stack.json"
    stack.write_text(f'{{"version":1,"root":{{"kind":"dir","path":"{data}","coherence":"exclusive"}}}}')
    sentence = isolated.refused("mount", stack, mnt, environment={"POLYTROPO_COPY": "fast"})
    assert "tuned, libc, kernel" in sentence
